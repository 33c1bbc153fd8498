"""The `learner` section. The text under a key is its documentation (docs/configuration.md)."""

import json
from typing import Annotated

from pydantic import Field, model_validator

from palimpsest.common.config.objective import AdvantageConfig, AuditConfig, DiscrepancyConfig, LossConfig, VcpoConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS, ProximalConfig, SnapshotProximal
from palimpsest.common.config.section import FilePath, Positive, PositiveFloat, Section, Service, Share

TOKEN_LEVEL = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Kinds of advantages that differ from token to token."""


class OptimizerConfig(Section):
    """AdamW on float32 masters."""

    lr: PositiveFloat = 1e-6
    """Learning rate."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which lr rises from 0."""
    decay: Annotated[int, Field(ge=0)] = 0
    """Optimizer step at which lr, falling since the warm-up on a straight line, reaches `end_share`; 0: never."""
    end_share: Share = 0.1
    """Share of lr that is left from step `decay` on."""

    @model_validator(mode="after")
    def _decay_follows_the_warm_up(self) -> "OptimizerConfig":
        if self.decay and self.decay <= self.warmup:
            raise ValueError(f"decay ({self.decay}) ends before the warm-up ({self.warmup}) does: give it a later step")
        return self


class CheckpointConfig(Section):
    """Restartable state of the learner."""

    folder: FilePath | None = None
    """Default: `checkpoints` in the run's folder."""
    every: Positive = 1
    """Versions between two checkpoints."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Complete checkpoints kept."""


class LearnerConfig(Service):
    """The learner."""

    versions: Positive
    """The run ends when this version is published."""
    groups_per_batch: Positive = 32
    """Groups trained on for each version."""
    minibatches: Positive = 1
    """Optimizer steps for each version; its groups are dealt out among them."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Oldest tokens trained on, in versions; admission keeps to it before sampling."""
    micro_batch_tokens: Positive = 16384
    """Most tokens (padding included) in one forward pass."""
    recipe: str = ""
    """Name of a published method (docs/algorithms/recipes.md): sets the sections below as that method does; what is set
    beside it wins."""
    proximal: ProximalConfig = SnapshotProximal()
    """Where the clip's anchor comes from: three exact kinds, six surrogates."""
    discrepancy: DiscrepancyConfig = DiscrepancyConfig()
    loss: LossConfig = LossConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    vcpo: VcpoConfig = VcpoConfig()
    audit: AuditConfig = AuditConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    canary_trajectories: Positive = 16
    """Trajectories of the newest batch by which workers check a loaded version."""
    threads: Positive = 1
    """CPU threads of each rank."""
    record: bool = False
    """Keep every trained batch with all its log-probs in `records` in the run's folder."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "LearnerConfig":
        kind, kl, loss = self.proximal.kind, self.loss.kl, self.loss
        row = PROXIMAL_KINDS[kind]
        if row.per_forward_pass and (self.discrepancy.m2 != "off" or self.discrepancy.weight_normalize):
            raise ValueError(
                f"discrepancy.m2 and discrepancy.weight_normalize look at the whole minibatch before its passes, but "
                f"a {kind} proximal is made in them: choose another kind, or switch them off"
            )
        needed = (
            ("objective", loss.objective, "policy_gradient"), ("opsm", loss.opsm, "off"), ("entropy", loss.entropy, 0),
            ("epo.weight", loss.epo.weight, 0), ("kl.weight", kl.weight, 0),
        )  # fmt: skip
        other = [
            f"loss.{key} = {json.dumps(due)}, not {json.dumps(found)}" for key, found, due in needed if found != due
        ]
        if self.vcpo.baseline and other:
            raise ValueError(
                f"vcpo.baseline weighs each trajectory's gradient by its reward: it needs {'; '.join(other)}"
            )
        if kl.weight and kl.place == "reward" and self.advantages.kind not in TOKEN_LEVEL:
            raise ValueError(
                f'loss.kl.place = "reward" changes the rewards of tokens, which advantages.kind = '
                f'"{self.advantages.kind}" does not know: take one of {", ".join(TOKEN_LEVEL)}, or place = "loss"'
            )
        if self.audit.fraction and row.exact:
            raise ValueError(
                f'audit.fraction compares a surrogate with the old log-probs, but proximal.kind = "{kind}" is exact '
                f"already: set it to 0"
            )
        return self
