"""Recipes compared with the published methods (algorithms.md 2.4, and the defaults of sections 5 to 14)."""

import math
from typing import Any

import pytest
import torch

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.recipes import NEIGHBORS, RECIPES, TABLE, apply_recipe
from palimpsest.services.learner.corrections import Limits, correct
from palimpsest.services.learner.losses.objective import Objective
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.proximal.surrogates.linear_prox import linear
from tests.records.builders import a_learner

BEHAVIOR, OLD, CURRENT = -1.20, -1.10, -0.90
"""Worked example A."""
AVERAGE, ASYNC, MIXTURE = -1.00, -0.95, math.log(0.5 * math.exp(BEHAVIOR) + 0.5 * math.exp(CURRENT))
ANCHORS = {
    "snapshot": OLD,
    "bypass": BEHAVIOR,
    "ewma_prox": AVERAGE,
    "linear_prox": MIXTURE,
    "current_recompute": ASYNC,
}
ROWS = {
    "ppo_clip": (0.0, CURRENT - OLD),
    "ppo_clip_train_infer": (0.0, CURRENT - BEHAVIOR),
    "decoupled_exact": (OLD - BEHAVIOR, CURRENT - OLD),
    "ppo_ewma": (0.0, CURRENT - AVERAGE),
    "ppo_ewma_train_infer": (AVERAGE - BEHAVIOR, CURRENT - AVERAGE),
    "linear_prox": (0.0, CURRENT - MIXTURE),
    "decoupled_async": (ASYNC - BEHAVIOR, CURRENT - ASYNC),
}
"""Recipe -> log r_d, log r_s of section 2.4."""


def weight_ratio_gradient(
    config: LearnerConfig, *, behavior: float, proximal: float, current: float
) -> tuple[float, float, float]:
    """Weight, ratio and gradient of a token with advantage -1, for which a ratio above 1 is not clipped."""
    objective = Objective(config, length=4)
    mask = torch.ones(1, 1, dtype=torch.bool)
    mu, anchor, theta = (torch.tensor([[x]], dtype=torch.float64) for x in (behavior, proximal, current))
    correction = correct(anchor, mu, mask, missing=~mask, rules=objective.rules, limits=Limits())
    theta.requires_grad_()
    outcome = objective.outcome(Inputs(theta, anchor, mu, correction.weight, -mask.double(), mask), multiplier=0.0)
    (gradient,) = torch.autograd.grad(outcome.losses.sum(), theta)
    return float(correction.weight), float(outcome.log_update.exp()), float(gradient)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_two_factors_of_its_row_in_the_table(name: str) -> None:
    config = a_learner(**apply_recipe(name, {}))
    discrepancy, staleness = ROWS[name]
    found = weight_ratio_gradient(config, behavior=BEHAVIOR, proximal=ANCHORS[config.proximal.kind], current=CURRENT)
    assert found == pytest.approx((math.exp(discrepancy), math.exp(staleness), math.exp(discrepancy + staleness)))


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_masks_by_discrepancy_only_if_its_row_has_one(name: str) -> None:
    """The proximal probability is three times the behavior probability, except for bypass."""
    config = a_learner(**apply_recipe(name, {}))
    anchor = BEHAVIOR if config.proximal.kind == "bypass" else BEHAVIOR + math.log(3)
    weight, _, gradient = weight_ratio_gradient(config, behavior=BEHAVIOR, proximal=anchor, current=anchor + 0.01)
    assert (weight, gradient == 0.0) == ((0.0, True) if ROWS[name][0] else (1.0, False))


def test_the_share_of_linear_prox_weighs_the_behavior_policy() -> None:
    share = a_learner(**apply_recipe("linear_prox", {})).proximal.model_dump()["behavior_share"]
    behavior, current = torch.tensor(BEHAVIOR), torch.tensor(CURRENT)
    assert float(linear(behavior, current, behavior_share=share)) == pytest.approx(MIXTURE)


PUBLISHED: dict[str, dict[str, Any]] = {
    "ppo_ewma_async": {"proximal.window": "max_staleness", "proximal.reset": "paper", "proximal.threshold": 0.9},
    "tis": {"discrepancy.weight": "truncated", "discrepancy.weight_high": 2.0},
    "cis": {"discrepancy.weight": "clipped", "discrepancy.weight_low": 0.5, "discrepancy.weight_high": 2.0},
    "mis": {"discrepancy.weight": "ratio", "discrepancy.tokens": (0.5, 2.0)},
    "icepop": {
        "discrepancy.tokens": (0.5, 5.0),
        "loss.objective": "clipped",
        "loss.aggregation": "seq_mean_token_mean",
    },
    "geometric": {"discrepancy.geometric": (0.999, 1.001), "discrepancy.veto": 1e-4},
    "sequence_rejection": {"discrepancy.sequence": (0.5, 2.0), "discrepancy.veto": 1e-4},
    "dapo": {"loss.clip_low": 0.2, "loss.clip_high": 0.28, "loss.aggregation": "token_mean"},
    "dual_clip": {"loss.dual_clip": 3.0},
    "gspo": {"loss.clip_low": 3e-4, "loss.clip_high": 4e-4, "loss.aggregation": "seq_mean_token_mean"},
    "cispo": {"loss.objective": "cispo", "loss.clip_low": 1.0},
    "minirl": {"loss.aggregation": "seq_mean_token_sum", "advantages.kind": "dr_grpo"},
    "opsm": {"loss.opsm": 1e-4},
    "vcpo": {
        "loss.objective": "policy_gradient",
        "discrepancy.weight": "truncated",
        "discrepancy.weight_level": "sequence",
        "discrepancy.weight_high": 8.0,
        "vcpo.lr_scaling": "sqrt",
        "vcpo.base": 1.0,
        "vcpo.baseline": True,
    },
    "m2po": {
        "loss.objective": "m2po",
        "loss.m2po.budget": 0.04,
        "loss.clip_low": 0.3,
        "loss.clip_high": 0.5,
        "discrepancy.weight": "off",
    },
    "epo": {
        "loss.entropy": 1e-3,
        "loss.epo.weight": 1e-3,
        "loss.epo.low": 0.8,
        "loss.epo.high": 1.2,
        "loss.epo.phase": 150,
        "loss.epo.gamma": 3.0,
        "loss.epo.history": "cumulative",
    },
    "dr_grpo": {"loss.aggregation": "dr_grpo", "advantages.kind": "dr_grpo"},
    "reinforce_pp": {"loss.kl.place": "reward", "advantages.gamma": 1.0},
    "ppo_gae": {"advantages.kind": "gae", "advantages.lam": 0.95},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    assert name in NEIGHBORS
    config = a_learner(**apply_recipe(name, {}))
    for key, expected in PUBLISHED[name].items():
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected, key


def test_recipes_with_their_own_rule_turn_the_default_band_off() -> None:
    """Recipes with their own discrepancy rule turn the default band off."""
    own = {
        name for name, keys in RECIPES.items() if {"tokens", "geometric", "sequence", "m2"} & set(keys["discrepancy"])
    }
    assert own == {"mis", "icepop", "geometric", "sequence_rejection"}
    assert {RECIPES[name]["discrepancy"]["band"] for name in own} == {"off"}
