"""Every family on the engine: it runs as the table of docs/models.md says, and an updated engine is a fresh one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families.measure import Refused, Runs, outcome
from tests.families.table import PAGE, rows
from tests.learner_parts.families import FAMILIES
from tests.runs.forked_engines import forked_engines

pytestmark = [pytest.mark.vllm, pytest.mark.long]
MOST = 0.05
"""Limit of the mean discrepancy in nats: bf16 on random weights; a layer left stale shows as 0.2."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engines")
    with forked_engines(folder):
        yield folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_or_is_refused_with_the_sentence_of_the_table(family: str, logs: Path, tmp_path: Path) -> None:
    result = outcome(family, tmp_path, logs)
    if isinstance(result, Refused):
        assert result.sentence in rows(PAGE.read_text())[family]
        return
    assert isinstance(result, Runs), f"the engine crashed: {result}"
    assert "| runs |" in rows(PAGE.read_text())[family]
    assert result.before < MOST
    assert result.after < MOST
    assert result.canary
    assert result.unequal == 0
