"""When a moving average is reset (algorithms.md 4.7)."""

from collections.abc import Sequence

import numpy as np
import pytest

from palimpsest.services.learner.proximal.surrogates.reset_rule import HEALTHY_VERSIONS, Cause, ResetState, Rule, decide
from tests.oracles import surrogates as oracle

PAPER = Rule("paper", threshold=0.9, patience=3, cooldown=8)
GUARDED = Rule("guarded", threshold=0.9, patience=3, cooldown=4)


def resets(shares: Sequence[float], rule: Rule) -> list[int]:
    """Return the versions at which the rule resets the average."""
    state, found = ResetState(), []
    for version, share in enumerate(shares):
        state, cause = decide(state, share, rule)
        if cause is not None:
            found.append(version)
    return found


def test_off_never_resets() -> None:
    assert resets([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], Rule("off", threshold=0.9, patience=1, cooldown=1)) == []


def test_the_papers_rule_resets_at_every_version_below_the_threshold() -> None:
    assert resets([0.95, 0.9, 0.8999, 0.5, 0.95, 0.89], PAPER) == [2, 3, 5]


def test_only_the_papers_rule_keeps_resetting_a_healthy_run_below_the_threshold() -> None:
    """In a pilot, even exact old log-probs had a share of 0.85 at staleness 8."""
    assert resets([0.85] * 20, PAPER) == list(range(20))
    assert resets([0.85] * 20, GUARDED) == []


def test_guarded_waits_for_several_versions_in_a_row() -> None:
    assert resets([0.8] * 5 + [0.6, 0.6, 0.8, 0.6, 0.6, 0.6], GUARDED) == [10]


def test_guarded_compares_with_the_median_of_the_first_healthy_versions() -> None:
    healthy = [0.5, 0.9, 0.8, 0.85, 0.8, 0.8, 0.8, 0.8]
    assert len(healthy) == HEALTHY_VERSIONS
    assert resets([*healthy, 0.721, 0.721, 0.721], GUARDED) == []  # 0.9 of 0.8 is 0.72
    assert resets([*healthy, 0.719, 0.719, 0.719], GUARDED) == [10]
    later = [*healthy, *[1.0] * 20]  # outside the window
    assert resets([*later, 0.8, 0.8, 0.8], GUARDED) == []


def test_guarded_does_not_reset_again_within_the_cooldown() -> None:
    low = [0.8] + [0.3] * 20
    assert resets(low, GUARDED) == [3, 8, 13, 18]
    assert resets(low, Rule("guarded", threshold=0.9, patience=3, cooldown=1)) == [3, 6, 9, 12, 15, 18]


def test_both_rules_equal_the_oracle() -> None:
    fired = {"paper": 0, "guarded": 0}
    for seed in range(200):
        generator = np.random.default_rng(seed)
        drop = np.where(generator.random(60) < 0.5, generator.uniform(0, 0.6, 60), 0.0)
        shares = np.clip(generator.uniform(0.6, 1.0) - np.repeat(drop[::4], 4), 0, 1).tolist()
        for kind in ("paper", "guarded"):
            options = {
                "threshold": float(generator.uniform(0.5, 1.0)),
                "patience": int(generator.integers(1, 6)),
                "cooldown": int(generator.integers(1, 12)),
            }
            got = resets(shares, Rule(kind, **options))
            assert got == oracle.resets(shares, kind=kind, **options), f"seed {seed}"
            fired[kind] += len(got)
    assert min(fired.values()) > 100


def test_the_cause_of_a_reset_is_reported() -> None:
    assert decide(ResetState(), 0.1, PAPER)[1] is Cause.BELOW_THRESHOLD
    assert decide(ResetState(healthy=(0.9,), low=2), 0.1, GUARDED)[1] is Cause.BELOW_HEALTHY_LEVEL


def test_a_version_without_trainable_tokens_is_ignored() -> None:
    nan = float("nan")
    assert resets([0.95, nan, nan], PAPER) == []
    assert resets([0.8, 0.3, 0.3, nan, 0.3], GUARDED) == [4]
    assert decide(ResetState(), nan, GUARDED)[0].healthy == ()


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("inf")])
def test_an_invalid_share_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"it must be in \[0, 1\]"):
        decide(ResetState(), wrong, PAPER)
