"""A critic and an adapter, trained on ranks that share rows and on one rank with whole rows (context_on_ranks.py)."""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.lora import LoraConfig
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.sharding.version_part import VersionPart
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.results import merge
from palimpsest.services.learner.training.trainer import Trainer
from tests.learner_parts.adapters import ADAPTER, LORA, renew
from tests.learner_parts.models import CPU
from tests.processes.critic_on_ranks import full, noting, values
from tests.processes.shard_on_ranks import OPTIMIZER
from tests.processes.sharded_versions import a_rank
from tests.processes.train_on_ranks import NOW, some_rows
from tests.records.builders import a_learner

CRITIC = "a critic, each layer computed again in the backward pass"
ADAPTED = "an adapter, and a critic with an adapter of its own; a divergence from version 0"
BESIDE = (CRITIC, ADAPTED)


def truncated(rows: list[Row]) -> list[Row]:
    """The rows, of which every second one reached a limit."""
    return [replace(row, truncated=i % 2 == 0) for i, row in enumerate(rows)]


MINIBATCHES = [truncated(some_rows("h", [35, 35, 33, 6, 31])), truncated(some_rows("i", [7]))]
"""The second one leaves the second of two groups without rows."""


def learner(case: str) -> LearnerConfig:
    adapted = case == ADAPTED
    return a_learner(
        advantages={"kind": "gae", "lam": 0.9, "critic": {"lr": 2e-3}},
        proximal={"kind": "bypass"},
        loss={"kl": {"weight": 0.1}} if adapted else {},
        lora={"rank": LORA.rank, "alpha": LORA.alpha, "targets": LORA.targets} if adapted else {},
        optimizer=OPTIMIZER.model_dump(),
        micro_batch_tokens=40,
        layout="packed",
        activation_checkpointing=case == CRITIC,
    )


def beside(case: str, model: str, mesh: DeviceMesh, shared: ProcessGroup, alone: ProcessGroup) -> dict[str, Any]:
    """Results of a version, "shared" by the ranks of a group and "alone"."""
    return {"alone": trained(case, model, None, alone), "shared": trained(case, model, mesh, shared)}


def trained(case: str, model: str, mesh: DeviceMesh | None, ranks: ProcessGroup) -> dict[str, Any]:
    """Results of one version. Tensors are whole. mesh: None: each rank has a whole model."""
    config, shards = learner(case), None
    policy: Any
    if mesh is None:
        whole = load_model(model, CPU, "sdpa", layout="packed")
        if config.lora.rank:
            add_adapter(whole, config.lora)
            renew(whole, seed=7)
        if config.activation_checkpointing:
            checkpoint_activations(whole)
        policy = TrainablePolicy(whole, OPTIMIZER)
    else:
        policy, shards = on_shards(config, model, mesh, ranks)
    no_store: Any = None
    state = build_training_state(
        config, policy, no_store, CPU, on_load=lambda _: None, ranks=ranks, shards=shards,
        adapter=ADAPTER if config.lora.rank else None,
    )  # fmt: skip
    assert state.critic is not None
    critic = state.critic.trainable
    critic.masters[-2].normal_(std=0.1, generator=torch.Generator().manual_seed(1))  # the head's weight
    critic._publish()
    found: dict[str, Any] = {"values": values(state.critic, MINIBATCHES[0]), "gradients": {}, "norms": {}}
    for name, trainable in (("policy", policy), ("critic", critic)):
        found["gradients"][name], found["norms"][name] = [], []
        trainable.step = noting(trainable, found["gradients"][name], found["norms"][name])
    own = Trainer(policy, state, ranks, config, length=64, seed=0).train(MINIBATCHES, NOW)
    together = merge(ranks.gather_shares(own))
    return found | {
        "masters": {
            name: [full(each) for each in getattr(part, "parameters", part.masters)]
            for name, part in (("policy", policy), ("critic", critic))
        },
        "loss": together.loss,
        "trained": sorted(row.trajectory for scored in together.micro_batches for row in scored.batch.rows),
    }


def on_shards(config: LearnerConfig, model: str, mesh: DeviceMesh, ranks: ProcessGroup) -> tuple[Any, Shards]:
    """A policy that is split over the ranks, and its shards. With a context, the ranks share rows."""
    lora = config.lora if config.lora.rank else LoraConfig()
    files = ModelFiles(model, "sdpa", mesh, ranks.device, layout="packed", context=ranks.context, lora=lora)
    if files.adapted:
        adapted = files.build(holds=COMPUTES, trains=True)
        renew(adapted, seed=7)
        no_store: Any = None
        adapter = AdapterPolicy(adapted, OPTIMIZER)
        return adapter, Shards(adapter, files, ranks, VersionPart(no_store, [], threads=1))
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    if config.activation_checkpointing:
        policy.model(checkpoint_activations)
    return policy, a_rank(policy, files, ranks)
