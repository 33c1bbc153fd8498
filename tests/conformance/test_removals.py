"""Removals by cause sum to the removed tokens, and the loss excludes exactly these (algorithms.md 15.4, 18.11)."""

import numpy as np
import pytest
import torch

from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.corrections import Limits, correct
from palimpsest.services.learner.losses.objective import Objective
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.observability.removals import (
    CLIPS,
    NO_CURRENT,
    TOKEN_MASKS,
    past_clip,
    removal,
    token_masked,
)
from palimpsest.services.learner.observability.surrogate_error import Thresholds
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.token_statistics import Tokens
from palimpsest.services.learner.observability.token_table import flatten
from palimpsest.services.learner.proximal.types import ProximalValues
from palimpsest.services.learner.training.accumulators import StepAccumulator, TokenTotals
from palimpsest.services.learner.training.results import MicroBatchResult
from tests.oracles import batch as oracle
from tests.records.builders import a_learner, a_row

DRAWS = 200
EVERYTHING = {
    "band": 1.3,
    "tokens": [0.8, 1.6],
    "geometric": [0.9, 1.15],
    "sequence": [0.5, 3.0],
    "segment": [0.85, 1.3],
    "veto": 0.55,
    "difference": 0.25,
    "estimates": {"k3_token": 0.05, "k2_sequence_max": 0.3},
}
CLIP = Thresholds(band=1.3, clip_low=0.2, clip_high=0.2)


def scored(seed: int, **loss: object) -> MicroBatchResult:
    """A micro-batch of three rows, corrected and scored by the real correction and objective."""
    generator = np.random.default_rng(seed)
    length = 12
    versions = generator.choice([-1, 0, 1, 2], (3, length))
    versions[:, 0] = 2
    rows = [
        a_row(f"r{i}", [5] * length, versions[i].tolist(), advantage=float(generator.choice([-1.5, 0.7])))
        for i in range(3)
    ]
    batch = pad(rows)
    mask = torch.from_numpy(batch.mask)
    behavior = torch.from_numpy(-generator.exponential(1.0, mask.shape).astype(np.float32))
    proximal = behavior + torch.from_numpy(generator.normal(0, 0.2, mask.shape).astype(np.float32))
    current = proximal + torch.from_numpy(generator.normal(0, 0.3, mask.shape).astype(np.float32))
    if seed % 3 == 0:
        behavior[1, 0] = float("nan")
        current[2, 0] = float("-inf")
    missing = mask & torch.from_numpy(generator.random(mask.shape) < 0.1)
    batch.behavior[:] = behavior.numpy()
    objective = Objective(a_learner(discrepancy=EVERYTHING, loss=loss), length=length)
    correction = correct(
        torch.where(missing, 0.0, proximal), behavior, mask, missing=missing, rules=objective.rules, limits=Limits()
    )
    advantages = torch.from_numpy(batch.advantages)
    inputs = Inputs(current.requires_grad_(), proximal, behavior, correction.weight, advantages, mask)
    outcome = objective.outcome(inputs, multiplier=0.0)
    return MicroBatchResult(
        batch=batch,
        anchor=ProximalValues(torch.where(missing, 0.0, proximal), missing, mask & ~missing),
        current=current.detach(),
        entropy=torch.zeros(mask.shape),
        correction=correction,
        clipped=outcome.clipped,
        advantages=advantages,
        old=None,
        first=True,
    )


@pytest.mark.parametrize("loss", [{"dual_clip": 1.5}, {"objective": "minirl"}, {"objective": "cispo"}, {"opsm": 0.01}])
def test_18_11_removals_by_cause_sum_to_the_removed_tokens(loss: dict[str, object]) -> None:
    seen = {"overlap": 0, "repeats": 0, "masked": 0, "clipped": 0}
    for seed in range(DRAWS):
        part = scored(seed, **loss)
        tokens = flatten(part, 2)
        got = removal(tokens, CLIP)
        causes = {name: gone.tolist() for name, gone in tokens.causes.items()}
        if not np.isfinite(tokens.current).all():
            causes[NO_CURRENT] = (~np.isfinite(tokens.current)).tolist()
        expected = oracle.removal(causes)
        assert {name: got[name] for name in expected} == expected, f"seed {seed}"
        marginal, exclusive = (sum(pair[i] for pair in got["causes"].values()) for i in (0, 1))
        assert exclusive + got["overlap"] == got["removed"] == marginal - got["repeats"]
        assert got["removed"] + got["active"] == got["tokens"] == int(part.batch.mask.sum())
        assert got["masked"] == int(part.correction.masked.sum())
        for name in seen:
            seen[name] += got[name]
    assert min(seen.values()) > DRAWS  # almost every batch has each kind


def test_18_11_active_tokens_are_those_with_a_gradient() -> None:
    """A token is active exactly if its log-prob has a gradient; tool output and padding never count."""
    for seed in range(DRAWS):
        part = scored(seed)
        mask = torch.from_numpy(part.batch.mask)
        objective = Objective(a_learner(discrepancy=EVERYTHING), length=12)
        current = part.current.clone().requires_grad_()
        behavior, advantages = torch.from_numpy(part.batch.behavior), part.advantages
        inputs = Inputs(current, part.proximal, behavior, part.correction.weight, advantages, mask)
        objective.outcome(inputs, multiplier=0.0).losses.sum().backward()
        assert current.grad is not None
        got = removal(flatten(part, 2), CLIP)
        assert got["active"] == int((current.grad != 0).sum())
        totals = TokenTotals.of([part], 2, StepAccumulator())
        no_current = int((~torch.isfinite(part.current) & mask & ~part.removed).sum())
        assert (totals.tokens, totals.active - no_current) == (got["tokens"], got["active"])


def test_18_11_every_cause_is_known_and_its_mask_is_boolean() -> None:
    part = scored(0)
    assert all(gone.dtype == np.bool_ for gone in flatten(part, 2).causes.values())
    known = {
        *CLIPS,
        *TOKEN_MASKS,
        "nonfinite",
        "missing",
        "veto",
        "sequence",
        "geometric",
        "segment",
        "k2_sequence_max",
    }
    assert set(flatten(part, 2).causes) <= known


def tokens_of(**values: object) -> Tokens:
    arrays = {
        "staleness": [0, 0, 1, 1],
        "behavior": [-1.0] * 4,
        "proximal": [-1.0] * 4,
        "current": [-1.0] * 4,
        "old": [-1.0] * 4,
        "entropy": [0.0] * 4,
        "advantages": [2.0, -1.0, 1.0, 0.0],
        "masked": [False] * 4,
        "clipped": [False] * 4,
    } | {name: value for name, value in values.items() if name != "causes"}
    causes = {name: np.array(gone) for name, gone in values.get("causes", {}).items()}  # type: ignore[attr-defined]
    return Tokens(**{name: np.array(value) for name, value in arrays.items()}, causes=causes)


def test_removals_are_weighted_by_absolute_advantage() -> None:
    causes = {"band_high": [True, False, False, False], "clip_high": [False, False, False, True]}
    got = removal(tokens_of(causes=causes), CLIP)
    assert got["advantage"] == pytest.approx(2 / 4)
    assert (got["positive"], got["negative"]) == (0.5, 0.0)
    assert (got["masked"], got["clipped"], got["active"]) == (1, 1, 2)


def test_shares_are_none_if_all_advantages_are_zero() -> None:
    got = removal(tokens_of(advantages=[0.0] * 4), CLIP)
    assert got["advantage"] is got["positive"] is got["negative"] is None
    assert got["causes"] == {}
    assert got["active"] == 4


def test_masked_tokens_beyond_the_clip_bounds_are_counted() -> None:
    """Ratio 1.3 with A > 0, 1.3 with A < 0, 1/1.3 with A > 0, 1/1.3 with A < 0: the clip removes the first and last."""
    up, causes = np.log(1.3), {"band_high": [True] * 4}
    tokens = tokens_of(current=[-1 + up, -1 + up, -1 - up, -1 - up], advantages=[1.0, -1.0, 1.0, -1.0], causes=causes)
    assert removal(tokens, CLIP)["masked_past_clip"] == 2
    assert removal(tokens, Thresholds(band=1.3, clip_low=None, clip_high=None))["masked_past_clip"] is None
    assert past_clip(tokens, CLIP) == 0.5
    assert past_clip(tokens, Thresholds(band=1.3, clip_low=None, clip_high=None)) is None


def test_token_masks_exclude_the_masks_of_trajectories() -> None:
    causes = {
        "geometric": [True] * 4,
        "missing": [True] * 4,
        "band_low": [False, True, False, False],
        "m2": [False, True, True, False],
    }
    assert token_masked(tokens_of(causes=causes)) == 0.5
    assert token_masked(tokens_of()) == 0.0
    assert token_masked(tokens_of().where(np.zeros(4, dtype=bool))) is None


@pytest.mark.parametrize(
    ("sections", "band", "clip"),
    [
        ({}, 2.0, 0.2),
        ({"discrepancy": {"band": "off"}}, None, 0.2),
        ({"discrepancy": {"band": "off", "tokens": [0.5, 2.0]}}, 2.0, 0.2),
        ({"discrepancy": {"band": "off", "tokens": [0.5, 5.0]}}, None, 0.2),
        ({"loss": {"objective": "minirl", "clip_high": 0.3}}, 2.0, 0.3),
        ({"loss": {"objective": "gspo"}}, 2.0, None),
        ({"loss": {"objective": "policy_gradient"}}, 2.0, None),
    ],
)
def test_thresholds_follow_from_the_configuration(
    sections: dict[str, object], band: float | None, clip: float | None
) -> None:
    bounds = RunThresholds.of(a_learner(**sections))
    assert (bounds.thresholds.band, bounds.thresholds.clip_high) == (band, clip)
    assert bounds.exact
    assert (bounds.weight_low, bounds.weight_high) == (None, None)


def test_weight_bounds_follow_from_the_kind_of_weight() -> None:
    truncated = RunThresholds.of(a_learner(discrepancy={"weight": "truncated", "weight_high": 3.0}))
    assert (truncated.weight_low, truncated.weight_high, truncated.of_sequence) == (None, 3.0, False)
    clipped = RunThresholds.of(a_learner(discrepancy={"weight": "clipped", "weight_level": "sequence"}))
    assert (clipped.weight_low, clipped.weight_high, clipped.of_sequence) == (0.5, 2.0, True)
    assert not RunThresholds.of(a_learner(proximal={"kind": "bypass"})).exact
