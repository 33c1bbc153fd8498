"""The configured loss as one object. Pure except for reading the configuration.

The packages corrections/ and losses/ hold the formulas, one per file. This module selects them and applies them in
order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.objective import DiscrepancyConfig, LossConfig
from palimpsest.services.learner.corrections import Rules
from palimpsest.services.learner.losses.aggregate import Denominators, aggregate
from palimpsest.services.learner.losses.cispo import cispo_loss
from palimpsest.services.learner.losses.entropy import Turns, epo_loss
from palimpsest.services.learner.losses.gspo import gspo_loss
from palimpsest.services.learner.losses.kl import kl_loss
from palimpsest.services.learner.losses.m2po import m2po_loss
from palimpsest.services.learner.losses.minirl import minirl_loss
from palimpsest.services.learner.losses.opsm import opsm_mask
from palimpsest.services.learner.losses.policy_gradient import policy_gradient_loss
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.r2vpo import r2vpo_loss
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero

T = TypeVar("T")


def switch(value: T | str) -> T | None:
    """Return None for "off", otherwise the value."""
    return None if isinstance(value, str) else value


def rules(config: DiscrepancyConfig) -> Rules:
    """Return the correction rules of the configuration."""
    return Rules(
        weight=config.weight,
        weight_level=config.weight_level,
        weight_low=config.weight_low,
        weight_high=config.weight_high,
        weight_normalize=config.weight_normalize,
        band=switch(config.band),
        tokens=switch(config.tokens),
        geometric=switch(config.geometric),
        sequence=switch(config.sequence),
        segment=switch(config.segment),
        veto=switch(config.veto),
        difference=switch(config.difference),
        estimates=dict(config.estimates.items()),
        m2=switch(config.m2),
    )


@dataclass(frozen=True, slots=True)
class Terms:
    """Additional inputs of the loss; [rows, tokens] each."""

    entropy: Tensor
    """With gradient, nats."""
    reference: Tensor | None
    """Log-probs of the starting model; None without a KL term."""


class Objective:
    """The loss of a micro-batch.

    `length`: sampling.max_trajectory_tokens.
    """

    def __init__(self, config: LearnerConfig, *, length: int) -> None:
        self.rules = rules(config.discrepancy)
        self.length = length
        self._config: LossConfig = config.loss

    def outcome(self, inputs: Inputs, *, multiplier: float, tau: float = 0.0) -> Outcome:
        """Return the loss and the removal causes of each token. multiplier: lambda of R2VPO; tau: see `m2po_tau`."""
        removed = None
        if (threshold := switch(self._config.opsm)) is not None:
            removed = opsm_mask(inputs, threshold=threshold)
            inputs = inputs.without(removed)
        outcome = self._loss(multiplier, tau)(inputs)
        return outcome if removed is None else outcome.and_also(opsm=removed)

    def divergence(self, inputs: Inputs, reference: Tensor) -> Tensor:
        """Return KL(current || start) of each token, [rows, tokens], 0 where not usable. reference: of the start."""
        kl = self._config.kl
        return kl_loss(
            inputs.current, reference, inputs.behavior, inputs.usable, estimator=kl.estimator, unbiased=kl.unbiased
        )

    def loss(
        self,
        outcome: Outcome,
        inputs: Inputs,
        terms: Terms,
        denominators: Denominators,
        *,
        history: Turns,
        phase: float = 1.0,
    ) -> Tensor:
        """Return this micro-batch's share of the loss, with gradient.

        history: mean entropy of each turn over earlier versions; phase: weight of EPO's penalty at this version.
        """
        config = self._config
        losses = outcome.losses
        if config.entropy:
            losses = losses - config.entropy * masked_fill_zero(terms.entropy, inputs.mask)
        if terms.reference is not None and config.kl.place == "loss":
            losses = losses + config.kl.weight * self.divergence(inputs, terms.reference)
        total = aggregate(losses, inputs.mask, config.aggregation, denominators)
        if config.epo.weight:
            total = total + epo_loss(
                terms.entropy,
                inputs.mask,
                history=history,
                low=config.epo.low,
                high=config.epo.high,
                weight=config.epo.weight * phase,
                sequences=denominators.sequences,
            )
        return total

    def _loss(self, multiplier: float, tau: float) -> Callable[[Inputs], Outcome]:
        config = self._config
        low, high = config.clip_low, config.clip_high
        match config.objective:
            case "clipped":
                return partial(ppo_loss, clip_low=low, clip_high=high, dual_clip=switch(config.dual_clip))
            case "policy_gradient":
                return policy_gradient_loss
            case "gspo":
                return partial(gspo_loss, clip_low=low, clip_high=high)
            case "cispo":
                return partial(cispo_loss, clip_low=low, clip_high=high)
            case "m2po":
                return partial(m2po_loss, tau=tau, clip_low=low, clip_high=high)
            case "minirl":
                return partial(minirl_loss, clip_low=low, clip_high=high)
            case "r2vpo":
                return partial(r2vpo_loss, multiplier=multiplier, target=config.r2vpo.target)
