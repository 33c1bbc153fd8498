"""Builds the sharded policy of a rank from the configuration."""

import os
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import checkpoint_activations
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards


def build_shards(config: RunConfig, ranks: ProcessGroup) -> Shards:
    """Return this rank's shards of the starting model. All ranks must call it. Raises UserError."""
    learner = config.learner
    files = ModelFiles(
        config.model.path,
        config.model.attention,
        _mesh(learner.sharding, ranks),
        ranks.device,
        logprob_chunk_tokens=learner.logprob_chunk_tokens,
        layout=learner.layout,
        context=ranks.context,
    )
    model = files.build(holds=torch.float32, trains=True, offload=learner.offload == "optimizer")
    if learner.activation_checkpointing:
        again = partial(checkpoint_activations, every=learner.activation_checkpointing_every)
        model(again)  # inside the root's call its passes can read all weights
    return Shards(ShardedPolicy(model, learner.optimizer, ranks), files, ranks)


def _mesh(sharding: str, ranks: ProcessGroup) -> DeviceMesh:
    """All ranks as shards, or with "hybrid" the ranks of each node: (nodes, ranks of a node)."""
    kind = ranks.device.type
    if sharding == "full":
        return init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks.size == of_node or ranks.size % of_node:
        raise UserError(
            f'learner.sharding = "hybrid" needs several nodes with equally many ranks, but {of_node} of {ranks.size} '
            f'ranks are on this node; set learner.sharding = "full"'
        )
    return init_device_mesh(kind, (ranks.size // of_node, of_node), mesh_dim_names=("replica", "shard"))
