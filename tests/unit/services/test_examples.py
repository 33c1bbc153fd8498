"""The examples in docstrings hold."""

import doctest

import pytest

from services.live import state, stopwatch, view
from services.local import deaths, restarts, words
from services.report import drawing, naming, summary


@pytest.mark.parametrize(
    "module", [deaths, restarts, words, state, stopwatch, summary, view, drawing, naming], ids=lambda m: m.__name__
)
def test_examples(module: object):
    tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert (tried.failed, tried.attempted > 0) == (0, True)
