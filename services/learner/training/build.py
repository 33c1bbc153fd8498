"""From the configuration to what a rank trains with: the source of the proximal, and the policy's companions."""

import copy

import torch

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import InterruptionProximal, MissingPolicy, ReplicaProximal, SnapshotProximal
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.services.learner import instruments
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.old_logprobs.precomputed_source import PrecomputedSource
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.types import Source
from palimpsest.services.learner.training.state import TrainingState


def build_training_state(
    config: LearnerConfig, trainee: TrainablePolicy, store: SnapshotClient, device: torch.device
) -> TrainingState:
    """Of a model at its start; `restore` takes them further."""
    model = trainee.model
    gae = config.advantages.kind == "gae"
    critic = config.optimizer.model_copy(update={"lr": config.advantages.critic.lr})
    misses = MissingCounter()
    return TrainingState(
        source=_source(config, trainee, store, device, misses),
        misses=misses,
        auditor=_snapshot(model, store, device) if config.audit.fraction else None,
        critic=Critic(model, critic) if gae else None,
        start=copy.deepcopy(model).requires_grad_(False) if config.loss.kl.weight else None,
        multiplier=config.loss.r2vpo.multiplier,
    )


def _source(
    config: LearnerConfig, trainee: TrainablePolicy, store: SnapshotClient, device: torch.device, misses: MissingCounter
) -> Source:
    model, proximal = trainee.model, config.proximal
    match proximal:
        case SnapshotProximal():
            return _snapshot(model, store, device, missing=proximal.missing, misses=misses)
        case ReplicaProximal():
            return PrecomputedSource(
                model, device, missing=proximal.missing, why=MissingReason.NOT_SCORED, misses=misses
            )
        case InterruptionProximal():
            return PrecomputedSource(model, device, missing=proximal.missing, why=MissingReason.TOO_LATE, misses=misses)
    return build_surrogate(
        proximal,
        model=model,
        masters=trainee.masters,
        device=device,
        max_staleness=config.max_staleness,
    )


def _snapshot(
    model: torch.nn.Module,
    store: SnapshotClient,
    device: torch.device,
    *,
    missing: MissingPolicy = "drop",
    misses: MissingCounter | None = None,
) -> SnapshotSource:
    """An audit leaves out what it cannot score; it never ends a run."""
    return SnapshotSource(
        model, store, device, loaded=lambda _: instruments.SNAPSHOT_LOADS.inc(), missing=missing, misses=misses
    )
