"""What a token's log-probs become in the loss: corrections, objective, advantages. The text under a key is its
documentation (docs/configuration.md); docs/algorithms has a page for each method."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from palimpsest.common.config.section import PositiveFloat, Section, Share

Off = Literal["off"]


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"[{low}, {high}] is no interval of ratios: it needs 0 <= low < high")
    return interval


Interval = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_check_interval)]
"""Lowest and highest ratio that is kept."""
AboveOne = Annotated[float, Field(gt=1)]
Estimate = Literal[
    "k1_token", "k1_sequence_sum", "k1_sequence_mean", "k1_sequence_max",
    "k2_token", "k2_sequence_sum", "k2_sequence_mean", "k2_sequence_max",
    "k3_token", "k3_sequence_sum", "k3_sequence_mean", "k3_sequence_max",
]  # fmt: skip


class DiscrepancyConfig(Section):
    """What is done about the discrepancy: a weight, and masks; each a switch of its own."""

    weight: Literal["off", "ratio", "truncated", "clipped"] = "ratio"
    """Factor on a token's loss: none, the discrepancy itself, at most weight_high (TIS), or inside [weight_low,
    weight_high] (CIS)."""
    weight_level: Literal["token", "sequence"] = "token"
    """Of each token by itself, or the product over its trajectory."""
    weight_low: PositiveFloat = 0.5
    """Lowest weight (`clipped`)."""
    weight_high: PositiveFloat = 2.0
    """Highest weight (`truncated`, `clipped`)."""
    weight_normalize: bool = False
    """Divide the weights by their mean over the minibatch's tokens; the factor is logged."""
    band: AboveOne | Off = 2.0
    """c: a token whose discrepancy is outside [1/c, c] is masked."""
    tokens: Interval | Off = "off"
    """A token whose discrepancy is outside is masked (MIS, IcePop)."""
    geometric: Interval | Off = "off"
    """A trajectory is masked when the geometric mean of its discrepancies is outside."""
    sequence: Interval | Off = "off"
    """A trajectory is masked when the product of its discrepancies is outside."""
    segment: Interval | Off = "off"
    """A run of sampled tokens is masked when the geometric mean of its discrepancies is outside."""
    veto: PositiveFloat | Off = "off"
    """A trajectory is masked when the discrepancy of any token is below this."""
    difference: PositiveFloat | Off = "off"
    """A token is masked when the two probabilities differ by more than this."""
    estimates: dict[Estimate, PositiveFloat] = {}
    """A token or trajectory is masked when this estimate of the divergence is above the bound."""
    m2: PositiveFloat | Off = "off"
    """M2PO: tokens with the largest squared log-discrepancy are masked until their mean square is below this."""

    @model_validator(mode="after")
    def _weights_are_ordered(self) -> "DiscrepancyConfig":
        if self.weight == "clipped" and self.weight_low > self.weight_high:
            raise ValueError(
                f"weight_low ({self.weight_low}) is above weight_high ({self.weight_high}): no weight is between them"
            )
        return self


class EpoConfig(Section):
    """Entropy kept near its own history (EPO)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the hinge; 0: off."""
    low: Share = 0.8
    """Entropy below this share of its history is penalized."""
    high: Annotated[float, Field(ge=1)] = 1.2
    """Entropy above this multiple of its history is penalized."""


class KlConfig(Section):
    """Divergence from the starting model."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """0: off, and no copy of the starting model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Of KL(current || start), from the log-ratio of the two."""
    place: Literal["loss", "reward"] = "loss"
    """Added to the loss, or taken off each token's reward (needs token-level advantages)."""
    unbiased: bool = True
    """Weighted by the total ratio, because the samples are not the current policy's (place = loss)."""


class R2vpoConfig(Section):
    """Variance of the ratio in place of a clip (R2VPO)."""

    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """lambda at the start."""
    target: PositiveFloat = 0.02
    """delta: mean (r - 1)^2 that is allowed."""
    rate: Annotated[float, Field(ge=0)] = 0.0
    """How fast lambda follows what was measured; 0: it stays."""


class LossConfig(Section):
    """The objective (docs/paper.md, "objective")."""

    objective: Literal["clipped", "policy_gradient", "gspo", "cispo", "minirl", "r2vpo"] = "clipped"
    """What is made of the staleness ratio."""
    clip_low: Share = 0.2
    """The staleness ratio is clipped at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The staleness ratio is clipped at 1 + clip_high."""
    dual_clip: AboveOne | Off = "off"
    """With a negative advantage no token's loss is more than this many times it (`clipped`)."""
    opsm: PositiveFloat | Off = "off"
    """A trajectory with a negative advantage is masked when the policy has moved from it by more than this, in nats a
    token."""
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "dr_grpo"] = "token_mean"
    """What a token's loss is divided by: all tokens, all trajectories, the same and its trajectory's tokens, or all
    trajectories and sampling.max_trajectory_tokens."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, per trained token."""
    epo: EpoConfig = EpoConfig()
    kl: KlConfig = KlConfig()
    r2vpo: R2vpoConfig = R2vpoConfig()


class CriticConfig(Section):
    """The value model of `gae`: a copy of the starting model with a scalar head."""

    lr: PositiveFloat = 1e-5
    """Its learning rate."""
    clip: PositiveFloat | Off = "off"
    """Values are kept this near to those before the version's training."""


class AdvantageConfig(Section):
    """From rewards to advantages."""

    kind: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"] = "grpo"
    """Group-relative (divided by the group's deviation, not divided, leave-one-out); return-to-go whitened over the
    batch, the same less the group's mean; or by a critic."""
    gamma: Share = 1.0
    """Discount for each sampled token (reinforce_pp, gae)."""
    lam: Share = 0.95
    """lambda of GAE."""
    critic: CriticConfig = CriticConfig()


class VcpoConfig(Section):
    """Variance kept in check (VCPO)."""

    lr_scaling: Literal["off", "sqrt", "linear"] = "off"
    """The step's learning rate is scaled by this function of the effective sample share."""
    base: Share = 1.0
    """Effective sample share from which the learning rate is whole."""
    baseline: bool = False
    """Baseline of least variance for each minibatch. Costs a backward pass for each trajectory."""


class AuditConfig(Section):
    """Exact scoring beside a surrogate."""

    fraction: Share = 0.0
    """Share of the batches that are also scored exactly, from snapshots, to report what the surrogate does wrong."""
