"""Configuration of the loss: corrections, objective, advantages.

docs/configuration.md is generated from the docstrings under the keys. docs/algorithms has a page for each method.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from palimpsest.common.config.section import PositiveFloat, Section, Share

Off = Literal["off"]


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"[{low}, {high}] is not a valid interval of ratios: it must satisfy 0 <= low < high")
    return interval


Interval = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_check_interval)]
"""Lowest and highest ratio inside the bound."""
AboveOne = Annotated[float, Field(gt=1)]
Estimate = Literal[
    "k1_token", "k1_sequence_sum", "k1_sequence_mean", "k1_sequence_max",
    "k2_token", "k2_sequence_sum", "k2_sequence_mean", "k2_sequence_max",
    "k3_token", "k3_sequence_sum", "k3_sequence_mean", "k3_sequence_max",
]  # fmt: skip


class DiscrepancyConfig(Section):
    """Corrections for the discrepancy: a weight and masks, each switched separately."""

    weight: Literal["off", "ratio", "truncated", "clipped"] = "ratio"
    """Factor on the loss of a token: none, the discrepancy, the discrepancy capped at weight_high (TIS), or the
    discrepancy clipped to [weight_low, weight_high] (CIS)."""
    weight_level: Literal["token", "sequence"] = "token"
    """`token`: the discrepancy of each token. `sequence`: the product of the discrepancies of its trajectory."""
    weight_low: PositiveFloat = 0.5
    """Lowest weight (`clipped`)."""
    weight_high: PositiveFloat = 2.0
    """Highest weight (`truncated`, `clipped`)."""
    weight_normalize: bool = False
    """Divide the weights by their mean over the tokens of the minibatch. A metric reports the factor."""
    band: AboveOne | Off = 2.0
    """c: mask tokens with a discrepancy outside [1/c, c]."""
    tokens: Interval | Off = "off"
    """Mask tokens with a discrepancy outside this interval (MIS, IcePop)."""
    geometric: Interval | Off = "off"
    """Mask trajectories whose geometric mean of discrepancies is outside this interval."""
    sequence: Interval | Off = "off"
    """Mask trajectories whose product of discrepancies is outside this interval."""
    segment: Interval | Off = "off"
    """Mask runs of sampled tokens whose geometric mean of discrepancies is outside this interval."""
    veto: PositiveFloat | Off = "off"
    """Mask trajectories that have a token with a discrepancy below this value."""
    difference: PositiveFloat | Off = "off"
    """Mask tokens whose old and behavior probability differ by more than this value."""
    estimates: dict[Estimate, PositiveFloat] = {}
    """Mask tokens or trajectories for which this estimate of the divergence exceeds the bound."""
    m2: PositiveFloat | Off = "off"
    """Mask tokens, largest squared log-discrepancy first, until the mean square of the rest is below this value, nats^2
    (second-moment mask). The published M2PO is loss.objective = "m2po"."""

    @model_validator(mode="after")
    def _weights_are_ordered(self) -> "DiscrepancyConfig":
        if self.weight == "clipped" and self.weight_low > self.weight_high:
            raise ValueError(
                f"weight_low ({self.weight_low}) is greater than weight_high ({self.weight_high}): lower weight_low"
            )
        return self


class EpoConfig(Section):
    """Penalty for entropy far from its running mean (EPO)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the hinge penalty; 0 disables it."""
    low: Share = 0.8
    """Entropy below this multiple of its running mean is penalized."""
    high: Annotated[float, Field(ge=1)] = 1.2
    """Entropy above this multiple of its running mean is penalized."""
    history: Literal["cumulative", "window"] = "cumulative"
    """Running mean of each turn's entropy: over all earlier versions, or over the newest 5."""
    phase: Annotated[int, Field(ge=2)] | Off = "off"
    """K: number of versions over which the weight of the penalty follows the published schedule. "off": constant."""
    gamma: PositiveFloat = 3.0
    """Decay of the weight in the second half of the schedule."""


class M2poConfig(Section):
    """Clip with a width that follows from the second moment of the log-ratios (M2PO)."""

    budget: PositiveFloat = 0.04
    """Upper bound of the mean of min(log-ratio^2, tau^2) over a minibatch's harmful tokens, nats^2; it sets tau."""


class KlConfig(Section):
    """KL penalty: divergence of the current policy from the starting model."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the penalty. 0 disables it; the learner then keeps no copy of the starting model."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Estimator of KL(current || start), computed from the log-ratio of the two policies."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: added to the loss. `reward`: subtracted from each token's reward (needs token-level advantages)."""
    unbiased: bool = True
    """Weight the penalty by the total ratio, because the current policy did not sample the tokens (place = loss)."""


class R2vpoConfig(Section):
    """Penalty on the variance of the ratio instead of a clip (R2VPO)."""

    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Initial value of lambda."""
    target: PositiveFloat = 0.02
    """delta: target of the mean of (r - 1)^2."""
    rate: Annotated[float, Field(ge=0)] = 0.0
    """Step size of the update of lambda; 0 keeps lambda constant."""


class LossConfig(Section):
    """The objective (docs/paper.md, "objective")."""

    objective: Literal["clipped", "policy_gradient", "gspo", "cispo", "m2po", "minirl", "r2vpo"] = "clipped"
    """Function of the staleness ratio that the loss maximizes."""
    clip_low: Share = 0.2
    """The staleness ratio is clipped at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The staleness ratio is clipped at 1 + clip_high."""
    dual_clip: AboveOne | Off = "off"
    """For a negative advantage, cap the loss of a token at this multiple of |advantage| (`clipped`)."""
    opsm: PositiveFloat | Off = "off"
    """Mask trajectories with a negative advantage for which the policy has moved by more than this value, in nats per
    token."""
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "dr_grpo"] = "token_mean"
    """Divisor of the loss of a token. `token_mean`: the number of tokens. `seq_mean_token_sum`: the number of
    trajectories. `seq_mean_token_mean`: the number of trajectories times the tokens of its own. `dr_grpo`: the number
    of trajectories times sampling.max_trajectory_tokens."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus per trained token."""
    epo: EpoConfig = EpoConfig()
    m2po: M2poConfig = M2poConfig()
    kl: KlConfig = KlConfig()
    r2vpo: R2vpoConfig = R2vpoConfig()


class CriticConfig(Section):
    """The value model of `gae`: a copy of the starting model with a scalar head."""

    lr: PositiveFloat = 1e-5
    """Learning rate of the value model."""
    clip: PositiveFloat | Off = "off"
    """Maximum change of a value, relative to its value before the training of the version."""


class AdvantageConfig(Section):
    """Advantages: how they are computed from rewards."""

    kind: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"] = "grpo"
    """Relative to the group: `grpo` (divided by the standard deviation of the group), `dr_grpo` (not divided), `rloo`
    (leave-one-out). Return-to-go, whitened over the batch: `reinforce_pp`, `reinforce_pp_baseline` (minus the mean of
    the group). With a critic: `gae`."""
    gamma: Share = 1.0
    """Discount per sampled token (reinforce_pp, gae)."""
    lam: Share = 0.95
    """lambda of GAE."""
    critic: CriticConfig = CriticConfig()


class VcpoConfig(Section):
    """Variance control (VCPO)."""

    lr_scaling: Literal["off", "sqrt", "linear"] = "off"
    """Scale the learning rate of the step by this function of the effective sample share."""
    base: Share = 1.0
    """Effective sample share at and above which the learning rate is not reduced."""
    baseline: bool = False
    """Use the minimum-variance baseline of each minibatch. Costs one backward pass per trajectory."""


class AuditConfig(Section):
    """Audit: exact scores to compare with a surrogate."""

    fraction: Share = 0.0
    """Fraction of the batches that are also scored exactly, from snapshots, to report the error of the surrogate."""
