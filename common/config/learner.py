"""The `learner` section. The text under a key is its documentation (docs/configuration.md)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import FilePath, Positive, PositiveFloat, Section, Service, Share


class SnapshotSource(Section):
    """Exact: a second copy of the model takes on each version's weights and scores its tokens."""

    kind: Literal["snapshot"] = "snapshot"


class LossConfig(Section):
    """Decoupled clipped objective (docs/paper.md, "objective")."""

    clip_low: Share = 0.2
    """The staleness ratio is clipped at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The staleness ratio is clipped at 1 + clip_high."""
    discrepancy_band: Annotated[float, Field(gt=1)] = 2.0
    """c: a token whose discrepancy is outside [1/c, c] is masked."""
    discrepancy_mask: bool = True
    """Whether the band masks tokens."""
    discrepancy_weight: bool = True
    """Whether the loss is weighted by the discrepancy."""
    advantages: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Group-relative advantage: divided by the group's deviation, not divided, or leave-one-out."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, per trained token."""


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
    old: SnapshotSource = SnapshotSource()
    """Where old log-probs come from."""
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    canary_trajectories: Positive = 16
    """Trajectories of the newest batch by which workers check a loaded version."""
    threads: Positive = 1
    """CPU threads of each rank."""
    record: bool = False
    """Keep every trained batch with all its log-probs in `records` in the run's folder."""
