"""The examples in docstrings are correct."""

import doctest

import pytest

from palimpsest.services.live import state, stopwatch, view
from palimpsest.services.local import console_text, exit_reasons, restart_policy
from palimpsest.services.report import charts, labels, summary


@pytest.mark.parametrize(
    "module",
    [exit_reasons, restart_policy, console_text, state, stopwatch, summary, view, charts, labels],
    ids=lambda m: m.__name__,
)
def test_examples(module: object):
    tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert (tried.failed, tried.attempted > 0) == (0, True)
