"""The examples in docstrings hold."""

import doctest

import pytest

from services import local, state, stopwatch, summary, view
from services.report import drawing


@pytest.mark.parametrize("module", [local, state, stopwatch, summary, view, drawing], ids=lambda m: m.__name__)
def test_examples(module: object):
    tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert (tried.failed, tried.attempted > 0) == (0, True)
