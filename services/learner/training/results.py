"""What a version's training leaves behind: every micro-batch with all that was computed for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import Correction
from palimpsest.services.learner.observability.token_statistics import Tokens
from palimpsest.services.learner.proximal.types import ProximalValues


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchResult:
    """A micro-batch; tensors are [rows, tokens] on the CPU, log-probs float32 in nats."""

    batch: PaddedBatch
    anchor: ProximalValues
    current: Tensor
    """Before the minibatch's optimizer step."""
    entropy: Tensor
    correction: Correction
    clipped: dict[str, Tensor]
    """bool, by cause."""
    advantages: Tensor
    """As used: those of the rows, or of each token."""
    old: Tensor | None
    """Old log-probs scored beside a surrogate, NaN where they could not be; None where the batch was not audited."""
    first: bool
    """Whether it belongs to the first minibatch: current is then the version just published."""

    @property
    def proximal(self) -> Tensor:
        """What stood in the clip's anchor; 0 where untrainable or missing."""
        return self.anchor.logprobs

    @property
    def removed(self) -> Tensor:
        """bool: trainable, but masked or clipped."""
        touched = [self.correction.masked, *self.clipped.values()]
        return torch.stack(touched).any(0)

    def tokens(self, now: Version) -> Tokens:
        """Its trainable tokens, flat."""
        mask = torch.from_numpy(self.batch.mask)
        unknown = torch.full_like(self.current, float("nan"))
        old = torch.where(self.anchor.exact, self.proximal, unknown) if self.old is None else self.old
        causes = self.correction.causes | self.clipped
        return Tokens(
            staleness=(now - torch.from_numpy(self.batch.versions))[mask].numpy(),
            behavior=torch.from_numpy(self.batch.behavior)[mask].numpy(),
            proximal=self.proximal[mask].numpy(),
            current=self.current[mask].numpy(),
            old=old[mask].numpy(),
            entropy=self.entropy[mask].numpy(),
            advantages=self.advantages[mask].numpy(),
            masked=self.correction.masked[mask].numpy(),
            clipped=torch.stack([torch.zeros_like(mask), *self.clipped.values()]).any(0)[mask].numpy(),
            causes={cause: removed[mask].numpy() for cause, removed in causes.items()},
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a version's training did on this rank."""

    scored: list[MicroBatchResult]
    method: str
    """Of the proximal: "exact", or a surrogate's name."""
    loss: float
    grad_norm: float
    """Largest over the minibatches, before clipping."""
    skipped: int
    """Minibatches whose gradient was not finite."""
    active_share: float
    """Of all ranks' trainable tokens, those neither masked nor clipped; NaN without any."""
    lr_factor: float = 1.0
    """Smallest over the minibatches, of the effective sample size."""
    baseline: float | None = None
    """VCPO's, mean over the minibatches."""
    normaliser: float = 1.0
    """Mean weight that weights were divided by, mean over the minibatches."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went: proximal, audit, prepare, passes, cut, step."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Of the source and the companions: decay, resets and the like."""
    missed: dict[str, int] = field(default_factory=dict)
    """"why/policy" -> tokens of all ranks that had no old log-prob, and what was done about them."""

    @property
    def exact(self) -> bool:
        """Whether the proximal is the old policy."""
        return self.method == "exact"


def merge(parts: Sequence[StepResult]) -> StepResult:
    """What all ranks did. What every rank knows alike is rank 0's."""
    lead = parts[0]
    return StepResult(
        scored=[scored for part in parts for scored in part.scored],
        method=lead.method,
        loss=sum(part.loss for part in parts),
        grad_norm=lead.grad_norm,  # of the summed gradients
        skipped=lead.skipped,
        active_share=lead.active_share,
        lr_factor=lead.lr_factor,
        baseline=lead.baseline,
        normaliser=lead.normaliser,
        seconds=lead.seconds,
        gauges=lead.gauges,
        missed=lead.missed,
    )


def counts(scored: Sequence[MicroBatchResult], now: Version) -> tuple[int, int, int]:
    """Trainable tokens, those neither masked nor clipped, and the sum of all their staleness."""
    tokens = active = age = 0
    for part in scored:
        mask = part.batch.mask
        tokens += int(mask.sum())
        active += int((mask & ~part.removed.numpy()).sum())
        age += int((now - part.batch.versions[mask]).astype(np.int64).sum())
    return tokens, active, age


def mean_entropies(scored: Sequence[MicroBatchResult]) -> tuple[float, int]:
    """Sum over trajectories of their tokens' mean entropy, nats, and how many trajectories have one."""
    total, count = 0.0, 0
    for part in scored:
        mask = torch.from_numpy(part.batch.mask) & torch.isfinite(part.entropy)
        has = mask.any(-1)
        means = torch.where(mask, part.entropy, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
        total += float(means[has].double().sum())
        count += int(has.sum())
    return total, count
