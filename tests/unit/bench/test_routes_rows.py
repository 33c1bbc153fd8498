"""The rows of 1, 2 and 4 versions of the benchmark of routes: their versions, the formula, and the targets."""

from pathlib import Path

import numpy as np
import pytest

from bench.routes import rows as benchmark
from bench.routes.figures import FORMULA_SLACK, row_targets
from bench.routes.rows import AGES, PROMPT, WIDTHS, figures, formula, rows_of
from bench.routes.variants import SHAPES, Load, build_model
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.old_logprobs.passes import cut_row

LOAD, NOW = Load(tokens=64), Version(9)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_have_equal_parts_of_consecutive_versions(width: int) -> None:
    rows = rows_of(width, NOW, load=LOAD, vocabulary=256, seed=1)
    assert len(rows) == LOAD.trajectories
    for i, row in enumerate(rows):
        versions, counts = np.unique(row.versions[PROMPT:], return_counts=True)
        last = NOW - i % AGES
        assert versions.tolist() == list(range(last - width + 1, last + 1))
        assert set(counts.tolist()) == {64 // width}
        assert (np.diff(row.versions) >= 0).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_formula_equals_the_counted_tokens_of_the_passes(width: int) -> None:
    """Each older version of a row costs a pass up to its last token; only prompts exceed the formula."""
    rows = rows_of(width, NOW, load=Load(tokens=640), vocabulary=256, seed=1)
    batch = pad(rows)
    scored = sum(
        len(cut_row(row, batch.versions[i] == version).tokens)
        for i, row in enumerate(rows)
        for version in np.unique(row.versions[PROMPT:])
        if version != NOW
    )
    share = scored / sum(len(row.tokens) for row in rows)
    assert formula(width) <= share * FORMULA_SLACK
    assert share <= formula(width) * FORMULA_SLACK


def test_figures_and_targets_by_hand() -> None:
    version = {
        "seconds": {"proximal": 0.2, "passes": 0.8, "step": 0.2}, "cpu": {"proximal": 0.1, "train": 0.6},
        "counts": {"pass_tokens": 264, "passes": 2, "loads": 1},
    }  # fmt: skip
    seen = figures([version], 1, LOAD)
    assert (seen["extra_step_share"], seen["extra_cpu_share"], seen["loads"]) == (0.2, 0.2, 1.0)
    assert seen["passes_per_row"] == round(264 / (6 * 66), 3) == round(formula(1), 3)
    rows = {"1": {"snapshot": seen, "ewma_prox": seen | {"extra_step_share": 0.3}}}
    assert set(row_targets(rows).values()) == {True}
    rows["1"]["ewma_prox"]["extra_step_share"] = 0.1
    assert list(row_targets(rows).values()) == [False, True]
    assert row_targets({}) == {}


def test_the_passes_of_a_trained_version_are_those_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trainers, sources and a store; times are not checked."""
    monkeypatch.setattr(benchmark, "WIDTHS", (2,))
    build_model(SHAPES["tiny"], tmp_path / "model")
    found = benchmark.measure(SHAPES["tiny"], LOAD, folder=tmp_path, model=tmp_path / "model", versions=1)["2"]
    seen = {name: route["passes_per_row"] for name, route in found.items()}
    assert seen["snapshot"] == pytest.approx(formula(2), rel=FORMULA_SLACK - 0.99)
    assert (seen["ewma_prox"], seen["bypass"], seen["current_recompute"]) == (1.0, 0.0, 0.0)
