"""The measured variants: every kind of `learner.proximal`, with the same model, load and pace."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palimpsest.common.config.schema import RunConfig

REFERENCE = "bypass"
"""The variant without old log-probs."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of proximal and a pace of the workers."""

    name: str
    proximal: Mapping[str, Any]
    """The learner.proximal section."""
    rollout: float | None = None
    """Time in which the workers sample a batch, in steps of the reference. None: the default, ROLLOUT."""


VARIANTS = (
    Variant(REFERENCE, {"kind": "bypass"}),
    Variant("snapshot", {"kind": "snapshot"}),
    Variant("snapshot_prefetch", {"kind": "snapshot", "prefetch": True}),
    Variant("replica", {"kind": "replica"}),
    Variant("interruption", {"kind": "interruption"}),
    Variant("interruption_busy", {"kind": "interruption"}, rollout=0.5),
    Variant("current_recompute", {"kind": "current_recompute"}),
    Variant("interp_prox_loglinear", {"kind": "interp_prox_loglinear"}),
    Variant("linear_prox", {"kind": "linear_prox"}),
    Variant("ewma_prox", {"kind": "ewma_prox"}),
    Variant("ppo_ewma_async", {"kind": "ppo_ewma_async"}),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Qwen3."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(hidden=64, layers=2, heads=2, vocabulary=256),
    "small": Shape(hidden=256, layers=12, heads=4, vocabulary=4096),
    "medium": Shape(hidden=512, layers=10, heads=8, vocabulary=8192),
}
"""The output head has about a tenth of the operations, as in a Qwen3 of 4 billion parameters."""


@dataclass(frozen=True, slots=True)
class Load:
    """The batch of a version."""

    tokens: int
    """Mean length of a trajectory."""
    groups: int = 3
    samples: int = 2
    max_staleness: int = 2
    micro_batch_tokens: int = 1024

    @property
    def trajectories(self) -> int:
        """Trajectories in a batch."""
        return self.groups * self.samples


@dataclass(frozen=True, slots=True)
class Place:
    """Files and ports of a variant."""

    folder: Path
    model: Path
    store_port: int
    replica_port: int


def build_model(shape: Shape, folder: Path) -> int:
    """Write a random model of this shape, in bf16, with tied embeddings. Returns the number of its parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=3 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=max(1, shape.heads // 2),
            head_dim=shape.hidden // shape.heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_config(variant: Variant, load: Load, place: Place) -> RunConfig:
    """Return the run of a variant. It writes no checkpoints, because they cost every variant the same."""
    longest = 2 * load.tokens
    return RunConfig.model_validate(
        {
            "run": {"id": variant.name, "folder": place.folder},
            "model": {"path": str(place.model)},
            "tasks": {"environments": {"lookup": 1.0}, "samples_per_group": load.samples, "time_limit_s": 86_400.0},
            "sampling": {"max_turn_tokens": longest - 1, "max_trajectory_tokens": longest},
            "snapshot_store": {"port": place.store_port},
            "replica": {"port": place.replica_port},
            "learner": {
                "versions": 1_000_000,
                "groups_per_batch": load.groups,
                "max_staleness": load.max_staleness,
                "micro_batch_tokens": load.micro_batch_tokens,
                "proximal": dict(variant.proximal),
                "checkpoint": {"every": 1_000_000},
                "canary_trajectories": 1,  # a small share of the batch, as in a batch of the usual size
            },
            "logs": {"level": "warning"},
        }
    )
