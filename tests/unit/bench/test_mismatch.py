"""Statistics of the toy's runs: slopes, intervals, and tables; and the published tables and figures."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import mismatch
from bench.mismatch.figures import COLORS, drawings, figures, moving_means
from bench.mismatch.measures import Part, RunTokens, bootstrap, by_staleness, less_group_mean, slope
from bench.mismatch.results import CONTROL, METHODS, Plan, tuned
from bench.mismatch.tables import tables
from bench.mismatch.toy import Toy
from bench.mismatch.training import Observed, observe
from palimpsest.services.learner.observability.surrogate_error import AuditedTokens, Thresholds

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[3]
MAIN = Thresholds(band=1.2, clip_low=0.2, clip_high=0.2)
TINY = Toy(hidden=8, window=2, prompts=4, group=4, minibatches=2, versions=4)
KEYS = {
    "mask_slope", "clip_slope", "clip_first_minibatch", "leak", "discrepancy_correlation", "final_reward",
}  # fmt: skip
INFINITE = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, as the program does: more threads than free cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_bootstrap_of_known_numbers() -> None:
    assert dataclasses.astuple(bootstrap([0.25] * 5)) == (0.25, 0.25, 0.25)
    assert dataclasses.astuple(bootstrap([0.0, 1.0])) == (0.5, 0.0, 1.0)  # each end has a probability of 1/4
    # the mean of a draw is Binomial(5, 1/5) / 5: P(at most 2) = 0.942, P(at most 3) = 0.993
    assert dataclasses.astuple(bootstrap([0.0, 0.0, 1.0, 0.0, 0.0])) == (0.2, 0.0, 0.6)
    # for many values, the mean +- 1.96 standard deviations / sqrt(n)
    normal = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = bootstrap(normal.tolist())
    assert interval.low == pytest.approx(normal.mean() - 1.96 * normal.std() / 20, abs=0.02)
    assert interval.high == pytest.approx(normal.mean() + 1.96 * normal.std() / 20, abs=0.02)


def test_a_paired_difference_has_a_narrower_interval_than_one_method() -> None:
    one = [0.1, 0.5, 0.9, 0.3, 0.7]
    other = [value - 0.05 for value in one]
    difference = bootstrap([a - b for a, b in zip(one, other, strict=True)])
    assert (difference.low, difference.high) == (pytest.approx(0.05), pytest.approx(0.05))
    alone = bootstrap(one)
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 0.4


def test_a_missing_value_of_a_seed_gives_no_interval() -> None:
    assert dataclasses.astuple(bootstrap([0.5, None])) == (None, None, None)
    assert dataclasses.astuple(bootstrap([])) == (None, None, None)


def test_slopes_and_means_by_staleness_against_numpy() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        staleness = np.concatenate([np.arange(4), random.integers(0, 4, 50)])
        removed = random.random(54) < 0.1 + 0.2 * staleness
        expected = np.polyfit(staleness.astype(float), removed.astype(float), 1)[0]
        assert slope(removed, staleness) == pytest.approx(expected, abs=1e-9)
        assert by_staleness(removed, staleness) == [float(removed[staleness == s].mean()) for s in range(4)]
        places = random.integers(4, 8, 54)
        # equal to a regression with one constant per place
        constants = np.stack([staleness, *(places == place for place in range(4, 8))], axis=1).astype(float)
        expected = np.linalg.lstsq(constants, removed.astype(float), rcond=None)[0][0]
        within = slope(less_group_mean(removed, places), less_group_mean(staleness, places))
        assert within == pytest.approx(expected, abs=1e-9)
    assert slope(np.array([True, False]), np.array([3, 3])) == 0.0


def part(surrogate: list[float], *, first: bool, masked: list[bool], clipped: list[bool]) -> Part:
    """Return two tokens of staleness 0 and 1, with old log-probs -1.0 and -2.0 and behavior 0.1 below and 0.1 above."""
    tokens = AuditedTokens(
        staleness=np.array([0, 1]),
        behavior=np.array([-1.1, -1.9]),
        surrogate=np.array(surrogate),
        old=np.array([-1.0, -2.0]),
        current=np.array([-1.0, -2.0]),
        advantages=np.ones(2),
    )
    return Part(tokens, np.array([4, 4]), np.array(masked), np.array(clipped), first)


def test_statistics_of_four_tokens_by_hand() -> None:
    parts = [
        part([-1.0, -1.7], first=True, masked=[False, True], clipped=[False, False]),
        part([-1.0, -1.9], first=False, masked=[False, True], clipped=[True, False]),
    ]
    statistics = RunTokens(parts).statistics()
    assert (statistics.mask_slope, statistics.clip_slope, statistics.clip_first_minibatch) == (1.0, -0.5, 0.0)
    assert statistics.leak == pytest.approx((0.3 + 0.1) / 4)
    assert statistics.leak_rms == pytest.approx(((0.09 + 0.01) / 4) ** 0.5)
    # measured: 0.1, 0.2, 0.1, 0.0; true: 0.1, -0.1, 0.1, -0.1. The products of the deviations cancel
    assert statistics.discrepancy_correlation == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="more versions than its window"):
        RunTokens().statistics()


@pytest.fixture(scope="module")
def observed() -> Observed:
    return observe(Toy(hidden=16, window=4, versions=14, learning_rate=1e-2), MAIN, seed=0)


def test_exact_has_no_leak_and_measures_the_true_discrepancy(observed: Observed) -> None:
    exact = observed.references["exact"]
    assert (exact.leak, exact.leak_rms) == (0.0, 0.0)
    assert exact.discrepancy_correlation == pytest.approx(1.0)


def test_recompute_never_clips_in_the_first_minibatch(observed: Observed) -> None:
    assert observed.references["current_recompute"].clip_first_minibatch == 0.0
    assert observed.references["exact"].clip_first_minibatch > 0.0


def test_recompute_masks_stale_tokens_and_exact_clips_them(observed: Observed) -> None:
    exact, recompute = observed.references["exact"], observed.references["current_recompute"]
    assert abs(exact.mask_slope) < 0.005
    assert recompute.mask_slope > 0.02
    assert exact.clip_slope > 0.01 > recompute.clip_slope


def test_18_4_an_average_of_decay_0_leaks_as_recompute_does(observed: Observed) -> None:
    assert observed.leaks[0.0] == pytest.approx(observed.references["current_recompute"].leak, rel=1e-6)


def test_bypass_masks_nothing_and_measures_no_discrepancy(observed: Observed) -> None:
    bypass = observed.references["bypass"]
    assert bypass.mask_by_staleness == [0.0] * 5
    assert bypass.discrepancy_correlation is None


def test_a_plan_runs_each_setting_once() -> None:
    plan = Plan(TINY, seeds=(0, 1), bands=(1.2, 1.5, INFINITE), clips=(0.2, 0.1, 0.4))
    assert plan.settings == [(1.2, 0.2), (1.5, 0.2), (INFINITE, 0.2), (1.2, 0.1), (1.2, 0.4)]
    assert plan.run("bypass", (1.2, 0.2), 0) == plan.run("bypass", (1.5, 0.2), 0)
    assert plan.run(CONTROL, (1.2, 0.2), 0).toy.window == 0
    assert plan.run("exact", (INFINITE, 0.2), 0).thresholds == Thresholds(band=None, clip_low=0.2, clip_high=0.2)
    runs = plan.runs()
    assert len(runs) == len(set(runs)) == 2 * (5 * len(METHODS) - 2)


def test_a_setting_is_tuned_on_the_other_seeds() -> None:
    by_setting = {(1.2, 0.2): [0.9, 0.2, 0.2], (INFINITE, 0.2): [0.1, 0.3, 0.3]}
    # seed 0 prefers the first setting; the others tune the second for it, and it tunes the first for them
    assert tuned(by_setting) == {"c": "1.2", "epsilon": 0.2, **dataclasses.asdict(bootstrap([0.1, 0.2, 0.2]))}
    assert tuned({(1.2, 0.2): [0.5]})["mean"] is None


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return mismatch.measure(Plan(TINY, (0, 1), (1.2, INFINITE), (0.2, 0.4)), processes=1)


def test_the_result_has_every_documented_field(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["seeds"] == [0, 1]
    assert tuple(measured["methods"]) == METHODS
    for method in measured["methods"].values():
        assert method.keys() >= KEYS
        final = method["final_reward"]
        assert final.keys() >= {"mean", "low", "high", "by_c", "by_epsilon", "tuned"}
        assert (list(final["by_c"]), list(final["by_epsilon"])) == (["1.2", "inf"], ["0.2", "0.4"])
        assert final["by_c"]["1.2"]["by_seed"] == final["by_epsilon"]["0.2"]["by_seed"] == final["by_seed"]
        assert final["low"] <= final["mean"] <= final["high"]
    assert measured["methods"]["exact"]["final_reward"]["less_exact"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert measured["methods"][CONTROL]["leak"]["mean"] is None
    assert measured["methods"][CONTROL]["final_reward"]["clipped"] >= 0.0


def test_figures_and_tables_can_be_made_of_it(measured: dict[str, Any], tmp_path: Path) -> None:
    mismatch.write(measured, tmp_path / "new")
    written = {path.stem: path.read_text() for path in (tmp_path / "new").glob("*.svg")}
    assert written == drawings(measured)
    assert all("<svg " in text and "nan" not in text for text in written.values())
    assert json.loads((tmp_path / "new" / "mismatch.json").read_text()) == measured
    rows = {name: table.splitlines() for name, table in tables(measured).items()}
    assert {name: len(lines) - 2 for name, lines in rows.items()} == {
        "passive": len(METHODS) - 1,
        "active": len(METHODS),
        "thresholds": len(METHODS),
    }
    assert all(len({line.count("|") for line in lines}) == 1 for lines in rows.values())


@pytest.mark.parametrize(
    ("arguments", "seeds", "versions", "settings"),
    [(["--quick"], 2, 40, 1), ([], 5, 200, 5), (["--seeds=7", "--versions=30"], 7, 30, 5)],
)
def test_arguments_set_the_plan(
    arguments: list[str], seeds: int, versions: int, settings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def measure(plan: Plan, *, processes: int) -> dict[str, Any]:
        assert processes <= 2
        plans.append(plan)
        return {}

    monkeypatch.setattr(mismatch, "measure", measure)
    assert mismatch.main(arguments).keys() == {"seconds"}
    assert (len(plans[0].seeds), plans[0].toy.versions, len(plans[0].settings)) == (seeds, versions, settings)


@pytest.mark.parametrize("argument", ["--versions=8", "--seeds=0", "--processes=0"])
def test_invalid_arguments_are_refused(argument: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        mismatch.main([argument])


def test_a_figure_plots_the_measured_numbers(measured: dict[str, Any]) -> None:
    drawn = figures(measured)
    (axes,) = drawn["mismatch-curves"].axes
    assert [line.get_label() for line in axes.lines] == list(COLORS)
    for line in axes.lines:
        method = measured["methods"][str(line.get_label())]
        assert np.asarray(line.get_ydata()).tolist() == moving_means(method["reward_by_version"])
    for axes, key in zip(drawn["mismatch-removed"].axes, ("mask_by_staleness", "clip_by_staleness"), strict=True):
        for line in axes.lines:
            means = [interval["mean"] for interval in measured["methods"][str(line.get_label())][key]]
            assert np.asarray(line.get_ydata()).tolist() == means


def test_the_published_tables_and_figures_match_the_published_numbers() -> None:
    published = json.loads((ROOT / "docs" / "results" / "mismatch.json").read_text())
    page = (ROOT / "docs" / "results.md").read_text()
    for name, table in tables(published).items():
        assert table in page, name
    for name, drawing in drawings(published).items():
        assert (ROOT / "docs" / "results" / f"{name}.svg").read_text() == drawing
        assert f"results/{name}.svg" in page
