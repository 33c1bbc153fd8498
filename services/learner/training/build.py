"""Builds the training state of a rank from the configuration: the proximal source, the auditor, the critic."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import InterruptionProximal, MissingPolicy, ReplicaProximal, SnapshotProximal
from palimpsest.common.logs import logger
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.critic import Critic, critic_optimizer
from palimpsest.services.learner.model.lora import copy_adapter, copy_trained
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.old_logprobs.precomputed_source import PrecomputedSource
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.old_logprobs.versioned_model import MovableModel, VersionedModel
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.surrogates.forward_pass import SplitPolicy
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.types import Source
from palimpsest.services.learner.sharding.load import COMPUTES
from palimpsest.services.learner.sharding.sharded_critic import build_critic
from palimpsest.services.learner.sharding.sharded_model import local_values
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.sharding.versioned_adapter import VersionedAdapter
from palimpsest.services.learner.sharding.versioned_shards import VersionedShards
from palimpsest.services.learner.training.state import TrainingState


@dataclass(frozen=True, slots=True)
class _Parts:
    """Arguments that sources are built from."""

    policy: TrainablePolicy
    store: VersionSource
    device: torch.device
    on_load: Callable[[Version], None]
    max_tokens: int
    """Of a pass, padding included."""
    ranks: ProcessGroup | None
    shards: Shards | None
    adapter: Adapter | None
    """Of the versions; None if they hold whole weights."""


def build_training_state(
    config: LearnerConfig,
    policy: TrainablePolicy,
    store: VersionSource,
    device: torch.device,
    *,
    on_load: Callable[[Version], None],
    ranks: ProcessGroup | None = None,
    shards: Shards | None = None,
    adapter: Adapter | None = None,
) -> TrainingState:
    """Return the state at the start of a run. `TrainingState.restore` then loads a checkpoint.

    on_load: called with each version that a source loads from the store; ranks: None if this process is alone;
    shards: of a sharded policy. All ranks must call it then. adapter: what the versions are; None: whole weights.
    """
    parts = _Parts(policy, store, device, on_load, config.micro_batch_tokens, ranks, shards, adapter)
    missed = MissingCounter()
    source = _build_source(config, parts, missed)
    split = None if shards is None else shards.split_policy
    if split is not None and isinstance(source, EwmaProx | PpoEwmaAsync):
        split.companions["average"] = source.average.means
    return TrainingState(
        source=source,
        misses=missed,
        auditor=_snapshot_source(parts) if config.audit.fraction else None,
        critic=_build_critic(config, parts) if config.advantages.kind == "gae" else None,
        start=_starting_model(parts) if config.loss.kl.weight else None,
        multiplier=config.loss.r2vpo.multiplier,
    )


def _build_source(config: LearnerConfig, parts: _Parts, missed: MissingCounter) -> Source:
    """Return the source of the configured kind. The type checker reports a kind without a source."""
    proximal = config.proximal
    match proximal:
        case SnapshotProximal():
            return _snapshot_source(
                parts,
                missing=proximal.missing,
                misses=missed,
                record_routes=config.routing_replay == "learner",
            )
        case ReplicaProximal():
            reason = MissingReason.NOT_SCORED
        case InterruptionProximal():
            reason = MissingReason.TOO_LATE
        case _:
            return build_surrogate(
                proximal,
                model=parts.policy.model,
                masters=parts.policy.masters,
                device=parts.device,
                max_staleness=config.max_staleness,
                load=partial(_stored_weights, parts),
                split=None if parts.shards is None else _split(parts.shards),
            )
    return PrecomputedSource(
        parts.policy.model,
        parts.device,
        max_tokens=parts.max_tokens,
        missing=proximal.missing,
        why=reason,
        misses=missed,
        ranks=parts.ranks,
    )


def _build_critic(config: LearnerConfig, parts: _Parts) -> Critic:
    if parts.shards is not None:
        return build_critic(parts.shards, config)
    return Critic(parts.policy.model, critic_optimizer(config))


def _starting_model(parts: _Parts) -> torch.nn.Module:
    if parts.shards is None:
        return copy_trained(parts.policy.model).requires_grad_(False)
    model = parts.shards.files.build(holds=COMPUTES, trains=False)
    copy_adapter(model.causal, parts.shards.policy.model.causal)
    return model


def _sharded_shadow(shards: Shards, parts: _Parts) -> MovableModel:
    model = shards.files.build(holds=COMPUTES, trains=False)
    if parts.adapter is not None:
        return VersionedAdapter(model, parts.store, parts.adapter, shards.ranks)
    return VersionedShards(model, shards.files, parts.store, shards.ranks)


def _split(shards: Shards) -> SplitPolicy:
    copy = partial(shards.files.build, holds=COMPUTES, trains=False)
    return SplitPolicy(copy, None if shards.split_policy is None else shards.ranks.all_gather_object)


def _stored_weights(parts: _Parts, version: Version) -> list[torch.Tensor] | None:
    """Return the weights of a stored version in the order of the masters, float32, or this rank's shards of them; None
    if the store has none."""
    if parts.shards is not None:
        model: MovableModel = _sharded_shadow(parts.shards, parts)
    else:
        model = VersionedModel(copy_trained(parts.policy.model), parts.store, parts.adapter)
    try:
        model.load_version(version)
    except VersionMissing:
        logger().warning("average reset to the current weights: the store lacks the version", version=version)
        return None
    parts.on_load(version)
    own, learns = model.model.parameters(), (parameter.requires_grad for parameter in parts.policy.model.parameters())
    return [local_values(each).float() for each, trained in zip(own, learns, strict=True) if trained]


def _snapshot_source(
    parts: _Parts,
    *,
    missing: MissingPolicy = "drop",
    misses: MissingCounter | None = None,
    record_routes: bool = False,
) -> SnapshotSource:
    """Return a SnapshotSource. With the defaults, for an audit, it leaves out tokens of missing versions."""
    return SnapshotSource(
        parts.policy.model,
        parts.store,
        parts.device,
        max_tokens=parts.max_tokens,
        loaded=parts.on_load,
        missing=missing,
        misses=misses,
        ranks=parts.ranks,
        adapter=parts.adapter,
        shadow=None if parts.shards is None else partial(_sharded_shadow, parts.shards, parts),
        record_routes=record_routes,
    )
