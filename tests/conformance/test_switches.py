"""Every key of learner.discrepancy and learner.loss reaches its formula with the configured value."""

import pytest
import torch

from palimpsest.common.config.objective import DiscrepancyConfig
from palimpsest.services.learner.corrections import Rules
from palimpsest.services.learner.losses.cispo import cispo_loss
from palimpsest.services.learner.losses.gspo import gspo_loss
from palimpsest.services.learner.losses.minirl import minirl_loss
from palimpsest.services.learner.losses.objective import Objective, rules
from palimpsest.services.learner.losses.policy_gradient import policy_gradient_loss
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.r2vpo import r2vpo_loss
from tests.conformance.test_objectives import Ours, draw, gradient, inputs_of
from tests.records.builders import UNCORRECTED, a_learner

LOSSES: dict[str, tuple[dict[str, object], Ours]] = {
    "clipped": ({}, lambda inputs: ppo_loss(inputs, clip_low=0.11, clip_high=0.07)),
    "clipped, dual": (
        {"dual_clip": 1.3},
        lambda inputs: ppo_loss(inputs, clip_low=0.11, clip_high=0.07, dual_clip=1.3),
    ),
    "policy_gradient": ({}, policy_gradient_loss),
    "gspo": ({}, lambda inputs: gspo_loss(inputs, clip_low=0.11, clip_high=0.07)),
    "cispo": ({}, lambda inputs: cispo_loss(inputs, clip_low=0.11, clip_high=0.07)),
    "minirl": ({}, lambda inputs: minirl_loss(inputs, clip_low=0.11, clip_high=0.07)),
    "r2vpo": ({"r2vpo": {"target": 0.5}}, lambda inputs: r2vpo_loss(inputs, multiplier=0.4, target=0.5)),
}


def test_every_rule_has_the_value_of_its_key() -> None:
    section = DiscrepancyConfig(
        weight="clipped", weight_level="sequence", weight_low=0.3, weight_high=1.7, weight_normalize=True, band=1.4,
        tokens=(0.6, 1.9), geometric=(0.98, 1.03), sequence=(0.2, 4.0), segment=(0.7, 1.1), veto=1e-3, difference=0.15,
        estimates={"k2_token": 0.5, "k3_sequence_mean": 0.01}, m2=0.06,
    )  # fmt: skip
    assert rules(section) == Rules(
        weight="clipped", weight_level="sequence", weight_low=0.3, weight_high=1.7, weight_normalize=True, band=1.4,
        tokens=(0.6, 1.9), geometric=(0.98, 1.03), sequence=(0.2, 4.0), segment=(0.7, 1.1), veto=1e-3, difference=0.15,
        estimates={"k2_token": 0.5, "k3_sequence_mean": 0.01}, m2=0.06,
    )  # fmt: skip
    assert rules(UNCORRECTED) == Rules()


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_has_the_bounds_of_its_keys(name: str) -> None:
    keys, ours = LOSSES[name]
    loss = {"objective": name.split(",")[0], "clip_low": 0.11, "clip_high": 0.07} | keys
    objective = Objective(a_learner(discrepancy=UNCORRECTED, loss=loss), length=8)
    for seed in range(20):
        inputs = inputs_of(draw(seed))
        found, expected = objective.outcome(inputs, multiplier=0.4), ours(inputs)
        assert torch.equal(found.losses, expected.losses)
        assert torch.equal(gradient(found, inputs), gradient(expected, inputs))
        assert found.clipped.keys() == expected.clipped.keys()
