"""The figures of measures, by hand."""

from typing import Any

import pytest

from palimpsest.services.report.charts import Figure
from palimpsest.services.report.measures import of_batches, of_workers_and_lengths
from tests.records.history_lines import a_line

WHOLE = {
    "discrepancy_k1": -0.01, "discrepancy_k2": 0.02, "discrepancy_k3": 0.03, "discrepancy_chi2": 0.04,
    "behavior_perplexity": 2.0, "proximal_perplexity": 2.5, "entropy": 0.7,
}  # fmt: skip
SHARES = {"tokens_raw": 0.9, "tokens_used": 0.95, "sequences_raw": 0.5, "sequences_used": 0.6}


def curves(figure: Figure | None) -> dict[str, list[Any]]:
    assert figure is not None
    return {trace.name: list(trace.y) for trace in figure.drawing.data}


def test_each_measure_is_a_curve_over_versions_and_an_unknown_one_is_a_gap() -> None:
    lines = [
        a_line(0, all=WHOLE, ess_shares=SHARES, grad_norm=1.5),
        a_line(1),  # of an older release
        a_line(2, all=WHOLE | {"discrepancy_k3": None}, ess_shares=SHARES, grad_norm=None),
    ]
    figure = of_batches(lines)
    found = curves(figure)
    assert figure is not None
    assert list(figure.drawing.data[0].x) == [1, 3]
    assert (found["k1"], found["k2"], found["k3"]) == ([-0.01] * 2, [0.02] * 2, [0.03, None])
    assert (found["perplexity, engine"], found["perplexity, learner"]) == ([2.0] * 2, [2.5] * 2)
    assert (found["tokens: total"], found["trajectories: used"]) == ([0.9] * 2, [0.6] * 2)
    assert (found["chi-square"], found["entropy"], found["gradient norm"]) == ([0.04] * 2, [0.7] * 2, [1.5, None])


def test_means_of_workers_and_lengths_are_weighted() -> None:
    """worker-0: 0.01 over 30 tokens and 0.03 over 10. Staleness 1: 3 trajectories of 10 tokens and one of 30."""
    lines = [
        a_line(0, by_worker={"worker-0": {"tokens": 30.0, "log_discrepancy_abs": 0.01}},
               versions={"oldest": {"0": 2, "1": 3}, "length": {"0": 8.0, "1": 10.0}}),
        a_line(1, by_worker={"worker-0": {"tokens": 10.0, "log_discrepancy_abs": 0.03},
                             "worker-1": {"tokens": 5.0, "log_discrepancy_abs": 0.2},
                             "worker-2": {"tokens": 5.0, "log_discrepancy_abs": None}},
               versions={"oldest": {"1": 1}, "length": {"1": 30.0}}),
    ]  # fmt: skip
    figure = of_workers_and_lengths(lines)
    assert figure is not None
    workers, lengths = figure.drawing.data
    assert list(workers.x) == ["worker-0", "worker-1", "worker-2"]
    assert list(workers.y) == [pytest.approx(0.015), 0.2, None]
    assert (list(lengths.x), list(lengths.y)) == ([0, 1], [8.0, 15.0])


def test_lines_without_measures_have_no_figure() -> None:
    assert of_batches([a_line(0)]) is None
    assert of_workers_and_lengths([a_line(0)]) is None


def test_every_axis_has_a_title() -> None:
    whole = a_line(0, all=WHOLE, ess_shares=SHARES, by_worker={"w": {"tokens": 1.0, "log_discrepancy_abs": 0.1}})
    for figure in (of_batches([whole]), of_workers_and_lengths([whole])):
        assert figure is not None
        for name, axis in figure.drawing.to_plotly_json()["layout"].items():
            if name.startswith("yaxis"):
                assert axis["title"]["text"], name
