"""Alert rules: each fires on its symptom and on nothing else.

exact_run.jsonl holds the statistics of a run with vLLM and old log-probs from snapshots: 40 versions of about 100
tokens each, staleness up to 3.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.services.learner.observability.alert_rules import LEAST_VERSIONS, PERSISTS, RULES, WINDOW, Alert, judge

Line = dict[str, Any]
REAL = Path(__file__).with_name("exact_run.jsonl")
AGES = (0, 1, 2, 3)


def a_line(seed: int, *, kind: str = "snapshot", objective: str = "clipped", **of: Callable[[int], float]) -> Line:
    """Return an ordinary history line with noise; `of` replaces the value of a key by a function of staleness."""
    generator = np.random.default_rng(seed)

    def at(age: int) -> dict[str, float]:
        masked = generator.binomial(200, 0.004) / 200
        values = {
            "tokens": 200.0,
            "masked": masked,
            "token_masked": masked,
            "clipped": generator.binomial(200, 0.03 * age) / 200,
            "past_clip": generator.binomial(200, 0.03 * age + 0.002) / 200,
            "entropy": float(generator.uniform(0.4, 0.6)),
            "log_discrepancy_abs": float(generator.normal(0.002, 0.0004)),
            "log_staleness_ratio_abs": 0.03 * age,
            "log_total_ratio_abs": 0.002 + 0.03 * age,
        }
        return values | {key: replaced(age) for key, replaced in of.items() if key in values}

    return {
        "version": seed,
        "kind": kind,
        "objective": objective,
        "grad_norm": 0.4,
        "learning_rate": 1e-5,
        "all": {"unsure": 400.0, "same": 0.01},
        "by_staleness": {str(age): at(age) for age in AGES},
        "first_minibatch": {str(age): at(age) for age in AGES},
        "fallbacks": {"missing": 0, "surrogate": 0, "nonfinite": 0},
    }


def run(count: int, **more: Any) -> list[Line]:
    return [a_line(seed, **more) for seed in range(count)]


def real(*, stand_in: bool = False) -> list[Line]:
    """Lines of a real run; with stand_in, the lines that current_recompute would have written for the same data."""
    lines: list[Line] = [json.loads(text) for text in REAL.read_text().splitlines()]
    for line in lines:
        line |= {"kind": "current_recompute" if stand_in else "snapshot", "objective": "clipped", "all": {}}
        for age, values in line["by_staleness"].items():
            values["token_masked"] = values["masked"]
            if stand_in:
                first = line["first_minibatch"][age]
                values["log_discrepancy_abs"] = first["log_total_ratio_abs"]
                first |= {"log_staleness_ratio_abs": 0.0, "clipped": 0.0}
    return lines


def judged(lines: list[Line]) -> list[list[Alert]]:
    """Judge one version after another, as a learner does."""
    found = []
    for i, line in enumerate(lines):
        found.append(judge(lines[max(0, i + 1 - WINDOW) : i + 1]))
        line["alerts"] = [{"rule": alert.rule, "level": alert.level} for alert in found[-1]]
    return found


def rules(lines: list[Line]) -> list[set[str]]:
    return [{alert.rule for alert in alerts} for alerts in judged(lines)]


def test_no_rule_fires_on_an_exact_run() -> None:
    assert set().union(*rules(run(300))) == set()


def test_no_rule_fires_on_a_real_exact_run() -> None:
    assert len(real()) == 40
    assert set().union(*rules(real())) == set()


def test_current_weights_in_the_proximals_place_are_detected() -> None:
    found = rules(real(stand_in=True))
    assert "clip_idle" in found[LEAST_VERSIONS]
    assert found[-1] == {"clip_idle", "discrepancy_by_staleness"}


def test_no_rule_fires_before_enough_versions() -> None:
    wrong = run(LEAST_VERSIONS + 3, token_masked=lambda age: 0.1 * age, kind="current_recompute")
    found = rules(wrong)
    assert set().union(*found[: LEAST_VERSIONS - 1]) == set()
    assert all("mask_by_staleness" in names for names in found[LEAST_VERSIONS - 1 :])


def test_a_masked_share_that_rises_with_staleness_fires() -> None:
    lines = run(20, token_masked=lambda age: 0.01 + 0.03 * age, kind="ewma_prox")
    (alert,) = [a for a in judged(lines)[-1] if a.rule == "mask_by_staleness"]
    assert alert.value == pytest.approx(0.03)
    assert "+3.0 points with each version of staleness, over 20 versions" in alert.says
    assert "the proximal is ewma_prox, a surrogate; set an exact learner.proximal.kind" in alert.says
    assert rules(run(20, token_masked=lambda age: 0.1 - 0.03 * age))[-1] == {"mask_by_staleness"}


def test_a_masked_share_that_hardly_rises_with_staleness_does_not_fire() -> None:
    assert rules(run(20, token_masked=lambda age: 0.01 + 0.015 * age))[-1] == set()


def test_slopes_of_alternating_sign_are_noise() -> None:
    """Each slope is far above the bound."""
    lines = [a_line(i, token_masked=lambda age, i=i: 0.2 + 0.05 * (-1) ** i * age) for i in range(60)]
    assert set().union(*rules(lines)) == set()


def test_a_staleness_with_few_tokens_is_ignored() -> None:
    lines = run(20, token_masked=lambda age: 0.3 * age, tokens=lambda age: 500.0 if age == 3 else 10.0)
    assert rules(lines)[-1] == set()


@pytest.mark.parametrize("why", ["missing", "nonfinite"])
def test_tokens_without_a_ratio_do_not_count_as_zero_discrepancy(why: str) -> None:
    """All fresh tokens lack a log-prob and leave the loss, so their mean over no tokens is written as 0."""

    def zero_at_staleness_0(of: float) -> Callable[[int], float]:
        return lambda age: of if age else 0.0

    lines = run(20, log_discrepancy_abs=zero_at_staleness_0(0.01), token_masked=zero_at_staleness_0(0.1))
    for line in lines:
        line["by_staleness"]["0"][why] = 200.0
    assert rules(lines)[-1] == set()


def zero(age: int) -> float:
    return 0.0


def test_a_clip_whose_proximal_follows_the_current_policy_fires() -> None:
    """Staleness is uniform, as in one-step-off training: nothing to compare with, but the weights changed."""
    lines = run(20, clipped=zero, log_staleness_ratio_abs=zero, kind="current_recompute")
    for line in lines:
        line["first_minibatch"] = {"1": line["first_minibatch"]["1"]}
        line["by_staleness"] = {"1": line["by_staleness"]["1"]}
    (alert,) = judged(lines)[-1]
    assert (alert.rule, alert.value) == ("clip_idle", 0.0)
    assert "the clip removes 0.00 % of stale tokens in the first minibatch, over 20 versions" in alert.says


def test_a_clip_that_bounds_only_part_of_the_ratio_fires() -> None:
    """The ratio to a mixture never passes the clip, while the total ratio passes it more often with staleness."""
    assert rules(run(20, clipped=zero, past_clip=lambda age: 0.05 * age, kind="linear_prox"))[-1] == {"clip_idle"}


def test_an_idle_clip_does_not_fire_while_the_policy_hardly_moves() -> None:
    slow = run(60, clipped=zero, past_clip=zero, log_staleness_ratio_abs=lambda age: 1e-3 * age)
    assert set().union(*rules(slow)) == set()


def test_an_idle_clip_does_not_fire_without_gradients() -> None:
    lines = run(60, clipped=zero, past_clip=zero, log_staleness_ratio_abs=zero)
    for line in lines:
        line["grad_norm"] = 0.0
    assert set().union(*rules(lines)) == set()


@pytest.mark.parametrize("objective", ["policy_gradient", "r2vpo"])
def test_clip_idle_does_not_apply_to_objectives_without_a_clip(objective: str) -> None:
    lines = run(20, clipped=zero, log_staleness_ratio_abs=zero, objective=objective)
    assert rules(lines)[-1] == set()


def test_fresh_tokens_do_not_count_as_an_idle_clip() -> None:
    lines = run(20, clipped=zero, log_staleness_ratio_abs=zero)
    for line in lines:
        line["first_minibatch"] = {"0": line["first_minibatch"]["0"]}
    assert rules(lines)[-1] == set()


def test_a_discrepancy_that_rises_with_staleness_fires() -> None:
    lines = run(20, log_discrepancy_abs=lambda age: 0.002 + 0.01 * age, kind="current_recompute")
    (alert,) = judged(lines)[-1]
    assert alert.rule == "discrepancy_by_staleness"
    assert alert.value == pytest.approx(0.01)
    assert "rises by 0.01 nats with each version of staleness, over 20 versions (mean 0.017 nats)" in alert.says


def test_a_discrepancy_that_rises_with_entropy_alone_does_not_fire() -> None:
    rising = {"log_discrepancy_abs": lambda age: 0.002 * (1 + age), "entropy": lambda age: 0.2 * (1 + age)}
    assert rules(run(20, **rising))[-1] == set()


def test_a_discrepancy_that_falls_with_staleness_does_not_fire() -> None:
    assert rules(run(20, log_discrepancy_abs=lambda age: 0.02 - 0.005 * age))[-1] == set()


def with_same(lines: list[Line], share: float, unsure: float = 400.0) -> list[Line]:
    for line in lines:
        line["all"] = {"unsure": unsure, "same": share}
    return lines


def test_a_discrepancy_of_one_everywhere_fires() -> None:
    found = judged(with_same(run(8), 1.0))
    assert [len(alerts) for alerts in found] == [0] * (PERSISTS - 1) + [1] * (8 - PERSISTS + 1)
    (alert,) = found[-1]
    assert (alert.rule, alert.level, alert.value) == ("discrepancy_is_one", "warning", 1.0)
    assert "of 100.0 % of tokens is exactly 1, for 5 versions" in alert.says


@pytest.mark.parametrize("kind", ["bypass", "interp_prox_loglinear", "linear_prox"])
def test_a_configured_discrepancy_of_one_gives_one_notice(kind: str) -> None:
    found = judged(with_same(run(60, kind=kind), 1.0))
    notices = [(version, alert.level) for version, alerts in enumerate(found) for alert in alerts]
    assert notices == [(PERSISTS - 1, "notice")]
    (alert,) = found[PERSISTS - 1]
    assert f'as configured (learner.proximal.kind = "{kind}")' in alert.says


def test_some_equal_tokens_and_certain_tokens_do_not_fire() -> None:
    assert rules(with_same(run(20), 0.9))[-1] == set()
    assert rules(with_same(run(20), 1.0, unsure=5.0))[-1] == set()  # a policy that is certain of nearly every token


def test_a_fallback_fires_at_once_and_persists_for_some_versions() -> None:
    lines = run(12)
    lines[2]["fallbacks"] = {"missing": 7, "surrogate": 0, "nonfinite": 2, "conflict": 1}
    found = judged(lines)
    assert [[alert.rule for alert in alerts] for alerts in found] == [
        ["fallback"] if 2 <= version < 2 + PERSISTS else [] for version in range(12)
    ]
    (alert,) = found[2]
    assert alert.value == 10.0
    assert "1 conflict, 7 had no old log-prob and were left out of the loss, 2 had a log-prob that is not" in alert.says


def with_fates(count: int, lost_share: dict[str, float], *, tokens: int = 500) -> list[Line]:
    """Lines with as many tokens in each bin of durations; the share of each bin is lost."""
    bins = {edge: [round(tokens * (1 - share)), round(tokens * share)] for edge, share in lost_share.items()}
    return [line | {"token_fates": {"length": {"64": [tokens, 0]}, "seconds": bins}} for line in run(count)]


def test_slow_trajectories_that_lose_more_of_their_tokens_fire() -> None:
    assert rules(with_fates(LEAST_VERSIONS - 1, {"1": 0.0, "2": 0.0, "4": 0.9}))[-1] == set()
    (alert,) = judged(with_fates(LEAST_VERSIONS, {"1": 0.0, "2": 0.0, "4": 0.9}))[-1]
    assert alert.rule == "lost_by_duration"
    assert alert.value == pytest.approx(0.9)
    assert "trajectories of 4 to 8 seconds lose 90 %" in alert.says
    assert "all trajectories 30 %" in alert.says


def test_equal_or_small_losses_do_not_fire() -> None:
    for lost in ({"1": 0.5, "2": 0.5, "4": 0.6}, {"1": 0.0, "2": 0.0, "4": 0.09}, {}):
        assert rules(with_fates(WINDOW, lost))[-1] == set(), lost
    rare = with_fates(WINDOW, {"1": 0.0})
    for line in rare:
        line["token_fates"]["seconds"]["64"] = [0, 9]
    assert rules(rare)[-1] == set(), "bins with under 2 % of the tokens"


def with_removed(count: int, removed: int, *, masked: int = 0, objective: str = "clipped") -> list[Line]:
    """Lines of 1,000 tokens of which masks and clips remove some, most by the veto."""
    causes = {"veto": [removed - 100, 0], "clip_high": [150, 0]}
    part = {"tokens": 1000, "removed": removed, "masked": masked, "causes": causes}
    return [line | {"removal": part} for line in run(count, objective=objective)]


def test_a_run_that_removes_most_of_its_tokens_says_so() -> None:
    found = judged(with_removed(PERSISTS, 686))
    assert found[:-1] == [[]] * (PERSISTS - 1)
    ((alert,),) = found[-1:]
    assert (alert.rule, alert.value) == ("mostly_removed", 0.686)
    assert "remove 69 % of the tokens of the newest 5 versions, veto 59 %" in alert.says
    assert judged(with_removed(PERSISTS, 499))[-1] == []
    after = [*with_removed(PERSISTS, 686), *with_removed(PERSISTS, 260)]
    assert rules(after)[-1] == {"mostly_removed"}, "an active alert ends at half of its bound"
    assert rules([*after, *with_removed(PERSISTS, 249)])[-1] == set()


def test_the_clip_of_cispo_removes_no_token() -> None:
    assert judged(with_removed(PERSISTS, 686, objective="cispo"))[-1] == []
    assert rules(with_removed(PERSISTS, 686, masked=510, objective="cispo"))[-1] >= {"mostly_removed"}


def test_an_active_alert_ends_below_half_of_its_threshold() -> None:
    weak = {"token_masked": lambda age: 0.01 + 0.015 * age}
    assert rules(run(40, **weak))[-1] == set()
    strong = run(20, token_masked=lambda age: 0.01 + 0.05 * age)
    after = [a_line(20 + i, **weak) for i in range(40)]
    assert rules(strong + after)[-1] == {"mask_by_staleness"}
    gone = [a_line(20 + i) for i in range(40)]
    assert rules(strong + gone)[-1] == set()


def test_versions_of_different_proximals_are_judged_separately() -> None:
    wrong = run(20, token_masked=lambda age: 0.1 * age, kind="current_recompute")
    assert rules(wrong + run(LEAST_VERSIONS))[-1] == set()


def test_lines_of_an_older_release_fire_nothing() -> None:
    old = [{key: line[key] for key in ("version", "grad_norm", "by_staleness", "first_minibatch")} for line in real()]
    for line in old:
        line |= {"all": {"nonfinite": 0.0}}
        for values in line["by_staleness"].values():
            values.pop("token_masked")
    assert set().union(*rules(old)) == set()
    assert judge([]) == []


def test_this_file_covers_every_rule() -> None:
    """Fails when a rule is added without a test."""
    assert set(RULES) == {
        "mask_by_staleness", "clip_idle", "discrepancy_by_staleness", "discrepancy_is_one", "fallback",
        "lost_by_duration", "mostly_removed",
    }  # fmt: skip
