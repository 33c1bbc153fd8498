"""Builds the policy of a process that holds all weights."""

import torch

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import checkpoint_activations, load_policy
from palimpsest.services.learner.model.starting_adapter import load_starting_adapter
from palimpsest.services.learner.model.trainable import TrainablePolicy


def build_policy(
    config: RunConfig, ranks: ProcessGroup, store: SnapshotClient, adapter: Adapter | None
) -> TrainablePolicy:
    """Return the policy at the start of a run: the model of the run, with the adapter of learner.lora.start.

    adapter: what is trained; None: all weights. Raises UserError.
    """
    learner = config.learner
    model = load_policy(config, ranks.device)
    read_start(model, config=config, ranks=ranks, store=store, adapter=adapter)
    if learner.activation_checkpointing:
        checkpoint_activations(model, every=learner.activation_checkpointing_every)
    return TrainablePolicy(model, learner.optimizer, offload=learner.offload == "optimizer")


def read_start(
    model: torch.nn.Module, *, config: RunConfig, ranks: ProcessGroup, store: SnapshotClient, adapter: Adapter | None
) -> None:
    """Read the adapter of learner.lora.start, if the run has one, into the model.

    Only rank 0 reads it, whose state the other ranks take over, and only if the store has no checkpoint of the run: a
    checkpoint replaces it. adapter: what is trained; None: all weights. Raises UserError.
    """
    start = config.learner.lora.start
    if start is not None and adapter is not None and ranks.is_rank0 and not Writer(store).committed():
        load_starting_adapter(model, start, adapter, config.model.path)
