"""The results of training a version: each micro-batch with everything computed for it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import Correction
from palimpsest.services.learner.proximal.types import ProximalValues


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchResult:
    """One micro-batch; tensors are [rows, tokens] on the CPU, log-probs float32 in nats."""

    batch: PaddedBatch
    anchor: ProximalValues
    current: Tensor
    """Log-probs of the policy before the minibatch's optimizer step."""
    entropy: Tensor
    correction: Correction
    clipped: dict[str, Tensor]
    """bool, by cause."""
    advantages: Tensor
    """As used: those of the rows, or of each token."""
    old: Tensor | None
    """Old log-probs scored beside a surrogate, NaN where they could not be; None where the batch was not audited."""
    first: bool
    """Whether it belongs to the first minibatch: then `current` is of the version trained at."""

    @property
    def proximal(self) -> Tensor:
        """The clip anchor; 0 where untrainable or missing."""
        return self.anchor.logprobs

    @property
    def removed(self) -> Tensor:
        """bool: trainable, but masked or clipped."""
        touched = [self.correction.masked, *self.clipped.values()]
        return torch.stack(touched).any(0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What training a version did, on one rank or, merged, on all."""

    micro_batches: list[MicroBatchResult]
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
    normalizer: float = 1.0
    """Mean weight that the weights were divided by, mean over the minibatches."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went: proximal, audit, prepare, passes, cut, step."""
    gauges: dict[str, float] = field(default_factory=dict)
    """State of the source, the multiplier and the like, by name."""
    missed: dict[str, int] = field(default_factory=dict)
    """"reason/policy" -> tokens of all ranks that had no old log-prob, and the policy that was applied to them."""

    @property
    def exact(self) -> bool:
        """Whether the proximal is the old policy."""
        return self.method == "exact"


def merge(parts: Sequence[StepResult]) -> StepResult:
    """Merge the results of all ranks. What is equal on every rank is taken from rank 0."""
    first = parts[0]
    return StepResult(
        micro_batches=[result for part in parts for result in part.micro_batches],
        method=first.method,
        loss=sum(part.loss for part in parts),
        grad_norm=first.grad_norm,  # of the summed gradients
        skipped=first.skipped,
        active_share=first.active_share,
        lr_factor=first.lr_factor,
        baseline=first.baseline,
        normalizer=first.normalizer,
        seconds=first.seconds,
        gauges=first.gauges,
        missed=first.missed,
    )
