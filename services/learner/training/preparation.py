"""Tensors of a batch that are computed before its first optimizer step, besides the proximal: advantages, the critic's
values and the starting model's log-probs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.advantages import TOKEN_KINDS, MicroBatchRewards, token_advantages
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.kl import estimate
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.proximal.types import Proximal
from palimpsest.services.learner.training.state import TrainingState


@dataclass(frozen=True, slots=True)
class Prepared:
    """Lists with one tensor for each micro-batch; [rows, tokens] float32 on the learner's device."""

    advantages: list[Tensor]
    reference: list[Tensor]
    """Log-probs of the starting model, nats; [] if the loss has no KL divergence."""
    values: list[Tensor]
    """Values of the critic; [] without a critic."""
    returns: list[Tensor]
    """Targets of the critic; [] without a critic."""


@dataclass(frozen=True, slots=True)
class VersionInputs:
    """Inputs of a version's passes. Lists have one entry for each micro-batch."""

    batches: list[PaddedBatch]
    proximal: Proximal
    audit: Proximal | None
    """Old log-probs of an audited batch; None if the batch is not audited."""
    prepared: Prepared
    phase: float
    """Weight of EPO's penalty at this version."""


@torch.no_grad()
def prepare_batch(
    state: TrainingState,
    batches: Sequence[PaddedBatch],
    config: LearnerConfig,
    ranks: ProcessGroup,
    device: torch.device,
) -> Prepared:
    """Prepare all micro-batches of this rank for a version. All ranks must call it."""
    reference, values = [], []
    for batch in batches:
        if state.start is not None:
            reference.append(score_batch(state.start, replace(batch, routes=None), device))
        if state.critic is not None:
            own = on_device(batch, device)
            values.append(state.critic.values(own.tokens, own.rows))
    kind = config.advantages.kind
    if kind not in TOKEN_KINDS:
        return Prepared([torch.from_numpy(batch.advantages).to(device) for batch in batches], reference, values, [])
    finals = _final_values(state.critic, batches, ranks, device) if state.critic is not None else None
    parts = [
        MicroBatchRewards(
            mask=batch.mask,
            rewards=np.array([row.advantage for row in batch.rows], dtype=np.float32),
            token_rewards=_kl_rewards(reference[i], batch, config) if config.loss.kl.place == "reward" else None,
            values=values[i].cpu().numpy() if values else None,
            final_values=None if finals is None else finals[i],
        )
        for i, batch in enumerate(batches)
    ]
    estimated = token_advantages(
        kind, parts, gamma=config.advantages.gamma, lam=config.advantages.lam, gather=ranks.gather_shares
    )
    return Prepared(
        [torch.from_numpy(part.advantages).to(device) for part in estimated],
        reference,
        values,
        [torch.from_numpy(part.returns).to(device) for part in estimated],
    )


def _final_values(
    critic: Critic, batches: Sequence[PaddedBatch], ranks: ProcessGroup, device: torch.device
) -> list[np.ndarray]:
    """Value of the state after the last token of each truncated trajectory, 0 for the others. [rows] float32 each.

    If a pass needs all ranks, they all pass a micro-batch for which one of them has such a trajectory.
    """
    truncated = [[i for i, row in enumerate(batch.rows) if row.truncated] for batch in batches]
    passes = [bool(own) for own in truncated]
    if ranks.equal_passes:
        passes = [any(of_ranks) for of_ranks in zip(*ranks.all_gather_object(passes), strict=True)]
    found = [np.zeros(len(batch.rows), dtype=np.float32) for batch in batches]
    for batch, own, values, needed in zip(batches, truncated, found, passes, strict=True):
        if needed:
            rows = own or [0]
            lengths = torch.tensor([len(batch.rows[i].tokens) for i in rows], device=device)
            scored = critic.final_values(torch.from_numpy(batch.tokens[rows]).to(device), lengths).cpu()
            values[own] = scored[: len(own)]
    return found


def _kl_rewards(reference: Tensor, batch: PaddedBatch, config: LearnerConfig) -> np.ndarray:
    """Reward of each token: -weight times its estimate of KL(behavior || start), [rows, tokens]."""
    mask, behavior = torch.from_numpy(batch.mask), torch.from_numpy(batch.behavior)
    log_ratios = log_ratio(reference.cpu(), behavior, mask & torch.isfinite(reference.cpu()))
    rewards: np.ndarray = (-config.loss.kl.weight * estimate(log_ratios, config.loss.kl.estimator)).numpy()
    return rewards
