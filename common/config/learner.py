"""The `learner` section. docs/configuration.md is generated from the docstrings under the keys."""

import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.config.objective import AdvantageConfig, AuditConfig, DiscrepancyConfig, LossConfig, VcpoConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS, ProximalConfig, SnapshotProximal
from palimpsest.common.config.section import FilePath, Positive, PositiveFloat, Section, Service, Share

LOGPROB_CHUNK_TOKENS = 1024
"""Default of learner.logprob_chunk_tokens."""
TOKEN_LEVEL = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Advantage kinds that give each token its own advantage."""
AVERAGES = ("ewma_prox", "ppo_ewma_async")
"""Proximal kinds that average the weights of versions."""
WITHOUT_BASELINE = ("reinforce_pp", "gae")
"""Advantage kinds without a baseline of the group."""


class OptimizerConfig(Section):
    """AdamW with float32 master weights."""

    lr: PositiveFloat = 1e-6
    """Learning rate."""
    beta1: Share = 0.9
    """Decay rate of the first moment."""
    beta2: Share = 0.95
    """Decay rate of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Term added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum gradient norm. Larger gradients are scaled down to it."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which lr rises linearly from 0."""
    decay: Annotated[int, Field(ge=0)] = 0
    """Optimizer step at which the linear decay of lr after the warm-up reaches `end_share`. 0 disables the decay."""
    end_share: Share = 0.1
    """Fraction of lr used from step `decay` on."""

    @model_validator(mode="after")
    def _decay_follows_the_warm_up(self) -> "OptimizerConfig":
        if self.decay and self.decay <= self.warmup:
            raise ValueError(f"decay ({self.decay}) must be greater than warmup ({self.warmup}), or 0 for no decay")
        return self


class CheckpointConfig(Section):
    """Checkpoints: the state from which the learner restarts."""

    folder: FilePath | None = None
    """Folder of the checkpoints. Default: `checkpoints` in the run's folder."""
    every: Positive = 1
    """Versions between two checkpoints."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of complete checkpoints to keep."""


class LearnerConfig(Service):
    """The learner."""

    versions: Positive
    """Number of versions to train. The run ends when this version is published."""
    groups_per_batch: Positive = 32
    """Groups in the batch of each version."""
    minibatches: Positive = 1
    """Optimizer steps for each version. The groups of the batch are divided among them."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Maximum staleness of a trained token, in versions. Admission keeps within it what a version can train on; the
    older tokens of a long trajectory are masked and counted (docs/algorithms/admission.md)."""
    admission: Literal["adaptive", "full"] = "adaptive"
    """Groups that may be unresolved. `full`: as many as `max_staleness` permits. `adaptive`: fewer while the learner
    never waits for a batch, which lowers the staleness at the same throughput (docs/algorithms/admission.md)."""
    max_overtaking: Annotated[int, Field(ge=0)] | Literal["unlimited"] = "unlimited"
    """Younger groups that may be trained on before a group that is not complete. Then the batch waits for that group. A
    lower number keeps more of the oldest tokens and lowers the throughput (docs/algorithms/admission.md)."""
    even_groups: Literal["keep", "skip"] = "keep"
    """Groups whose rewards are all equal: their advantages are 0. `skip` leaves them out of the batch and offers more
    groups until the batch is full, which biases what the batch shows (docs/algorithms/admission.md)."""
    micro_batch_tokens: Positive = 16384
    """Maximum number of tokens in one forward pass, padding included. Rows of similar length share a pass: the split
    into passes minimizes padding, or with packed rows the number of passes."""
    layout: Literal["padded", "packed"] = "padded"
    """Layout of a forward pass (docs/packing.md). `padded`: rows of equal length, padded on the right. `packed`: the
    rows one after another in one sequence, without padding. The value changes log-probs by rounding; every process of a
    run uses the same."""
    logprob_chunk_tokens: Positive = LOGPROB_CHUNK_TOKENS
    """Tokens whose logits are in memory at the same time, in the forward and in the backward pass. A bf16 model needs
    2 bytes for each of these tokens and each vocabulary entry: 0.3 GB at the default with 151,936 entries. The value
    changes log-probs by rounding; every process of a run uses the same."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass, which computes the layer again: less memory, one more
    forward pass. Log-probs and gradients are the same."""
    activation_checkpointing_every: Positive = 1
    """With `activation_checkpointing`: one of so many layers is computed again, the others keep their activations. 2
    costs half of the additional time and saves half of the memory."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """Split weights, gradients and moments over the ranks (docs/sharding.md). `none`: each rank holds all of them.
    `full`: each rank holds a share. `hybrid`: the ranks of a node share them, and each node holds all of them."""
    context_parallel: Positive = 1
    """Ranks that share the tokens of each row, for rows that do not fit one GPU (docs/context-parallelism.md). It
    divides `local.learner_ranks`, and needs `layout = "packed"`, `sharding = "full"` and the attention `sdpa`."""
    publishing: Literal["inline", "background"] = "inline"
    """`inline`: the next batch waits until a version is stored and announced. `background`: a thread does both while
    the learner takes the next batch and makes its passes; the next optimizer step waits (docs/publishing.md)."""
    offload: Literal["none", "optimizer"] = "none"
    """`optimizer`: float32 masters, gradients and moments are in the host's memory, and the step computes there
    (docs/memory.md). The GPU holds the bf16 weights, or gathers them with `sharding`. `none`: all on the GPU."""
    routing_replay: Literal["none", "learner", "engine"] = "none"
    """Mixtures of experts: replay the experts of each token in the training passes (docs/algorithms/routing-replay.md).
    `none`: the routers choose by themselves. `learner` (R2): those of the passes that computed the old log-probs.
    `engine` (R3): those that the engine sampled with, in the passes for old log-probs, too; they travel with the
    trajectories."""
    recipe: str = ""
    """Name of a published method (docs/algorithms/recipes.md). It sets the sections below. Keys that the run sets
    take precedence."""
    proximal: ProximalConfig = SnapshotProximal()
    """Source of the proximal log-probs, the anchor of the clip: three exact kinds, six surrogates."""
    discrepancy: DiscrepancyConfig = DiscrepancyConfig()
    loss: LossConfig = LossConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    vcpo: VcpoConfig = VcpoConfig()
    audit: AuditConfig = AuditConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    canary_trajectories: Positive = 16
    """Number of trajectories of the newest batch that workers score to verify a loaded version."""
    threads: Positive = 1
    """CPU threads of each rank."""
    record: bool = False
    """Write every trained batch, with all its log-probs, to `records` in the run's folder."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "LearnerConfig":
        kind, kl, loss = self.proximal.kind, self.loss.kl, self.loss
        row = PROXIMAL_KINDS[kind]
        if row.per_forward_pass and (self.discrepancy.m2 != "off" or self.discrepancy.weight_normalize):
            raise ValueError(
                f"discrepancy.m2 and discrepancy.weight_normalize need the proximal log-probs before the forward "
                f"passes of a minibatch, but a {kind} proximal is computed in each forward pass: choose another "
                f"proximal.kind, or switch both off"
            )
        needed = (
            ("objective", loss.objective, "policy_gradient"), ("opsm", loss.opsm, "off"), ("entropy", loss.entropy, 0),
            ("epo.weight", loss.epo.weight, 0), ("kl.weight", kl.weight, 0),
        )  # fmt: skip
        other = [
            f"loss.{key} = {json.dumps(required)}, not {json.dumps(value)}"
            for key, value, required in needed
            if value != required
        ]
        if self.vcpo.baseline and other:
            raise ValueError(
                f"vcpo.baseline weights the gradient of each trajectory by its reward: it needs {'; '.join(other)}"
            )
        if self.vcpo.baseline and self.advantages.kind in TOKEN_LEVEL:
            raise ValueError(
                f'vcpo.baseline replaces the advantages, so advantages.kind = "{self.advantages.kind}" would have no '
                f"effect: choose a group-level kind (grpo, dr_grpo, rloo), or set vcpo.baseline = false"
            )
        if self.even_groups == "skip" and (self.vcpo.baseline or self.advantages.kind in WITHOUT_BASELINE):
            switch = "vcpo.baseline = true" if self.vcpo.baseline else f'advantages.kind = "{self.advantages.kind}"'
            raise ValueError(
                f'even_groups = "skip" leaves out groups of equal rewards, but with {switch} they are trained on: '
                f'the baseline is not the group\'s: set even_groups = "keep"'
            )
        if kl.weight and kl.place == "reward" and self.advantages.kind not in TOKEN_LEVEL:
            raise ValueError(
                f'loss.kl.place = "reward" changes the reward of each token, but advantages.kind = '
                f'"{self.advantages.kind}" has no token rewards: choose one of {", ".join(TOKEN_LEVEL)}, or set '
                f'loss.kl.place = "loss"'
            )
        if self.context_parallel > 1 and (self.sharding != "full" or self.layout != "packed"):
            raise ValueError(
                f'context_parallel = {self.context_parallel} needs sharding = "full" and layout = "packed", not '
                f'"{self.sharding}" and "{self.layout}": set them, or set context_parallel = 1'
            )
        if self.routing_replay == "learner" and not (
            isinstance(self.proximal, SnapshotProximal) and not self.proximal.prefetch
        ):
            raise ValueError(
                'routing_replay = "learner" records the experts in the passes for old log-probs that come just before '
                'the training: it needs proximal.kind = "snapshot" with prefetch = false. Change it, or set '
                'routing_replay = "none"'
            )
        if self.routing_replay == "engine" and row.runs_replicas:
            raise ValueError(
                'routing_replay = "engine" is not known to replicas: choose another proximal.kind, or set '
                'routing_replay = "none"'
            )
        if self.audit.fraction and row.exact:
            raise ValueError(
                f"audit.fraction compares a surrogate with the old log-probs, but proximal.kind = "
                f'"{kind}" is exact: set audit.fraction to 0'
            )
        return self
