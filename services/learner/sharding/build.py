"""Builds the sharded policy of a rank from the configuration."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.encoding import THREADS
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.checkpoint_names import part_views
from palimpsest.services.learner.model.policy import checkpoint_activations
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.part_messages import PartServer, open_messages
from palimpsest.services.learner.sharding.sharded_model import ShardedModel
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.sharding.tensor_owners import tensor_owners
from palimpsest.services.learner.sharding.version_part import VersionPart


def build_shards(
    config: RunConfig,
    ranks: ProcessGroup,
    store: SnapshotClient,
    begin: Callable[[torch.nn.Module], None] = lambda _: None,
) -> Shards:
    """Return this rank's shards of the starting model. All ranks must call it. Raises UserError.

    store: gets the versions. begin: called with the model before its masters are made, to read the adapter that the run
    begins with.
    """
    learner = config.learner
    files = ModelFiles(
        config.model.path,
        config.model.attention,
        _mesh(learner.sharding, ranks),
        ranks.device,
        logprob_chunk_tokens=learner.logprob_chunk_tokens,
        layout=learner.layout,
        context=ranks.context,
        lora=learner.lora,
    )
    offload = learner.offload == "optimizer"
    if files.adapted:
        model = files.build(holds=COMPUTES, trains=True)
    else:
        model = files.build(holds=torch.float32, trains=True, offload=offload)
    begin(model)
    if learner.activation_checkpointing:
        again = partial(checkpoint_activations, every=learner.activation_checkpointing_every)
        model(again)  # inside the root's call its passes can read all weights
    if files.adapted:
        policy = AdapterPolicy(model, learner.optimizer, offload=offload)
        return Shards(policy, files, ranks, VersionPart(store, [], threads=1))
    part = build_part(model, files, ranks, store)
    messages = open_messages(ranks) if learner.publishing == "background" else None
    server = PartServer(messages, part) if messages is not None and not ranks.is_rank0 else None
    return Shards(ShardedPolicy(model, learner.optimizer, ranks), files, ranks, part, messages, server)


def build_part(model: ShardedModel, files: ModelFiles, ranks: ProcessGroup, store: SnapshotClient) -> VersionPart:
    """Return what this rank stores of each version. files: that built the model."""
    sizes: dict[str, int] = {}
    for own, parameter in model.shards():
        empty = torch.empty(parameter.shape, dtype=COMPUTES, device="meta")
        sizes |= {name: part.numel() * part.element_size() for name, part in part_views(files.names[own], empty)}
    owners = tensor_owners(sizes, ranks.size)
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return VersionPart(
        store, [name for name in sizes if owners[name] == ranks.rank], threads=max(1, THREADS // of_node)
    )


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
