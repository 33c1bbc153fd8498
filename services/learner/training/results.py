"""Results of training a version: each micro-batch with the tensors computed for it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import Correction
from palimpsest.services.learner.proximal.types import ProximalValues


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchResult:
    """Result of one micro-batch. Tensors are [rows, tokens] on the CPU, log-probs float32 in nats."""

    batch: PaddedBatch
    anchor: ProximalValues
    current: Tensor
    """Log-probs of the policy before the minibatch's optimizer step."""
    entropy: Tensor
    correction: Correction
    clipped: dict[str, Tensor]
    """bool, by cause."""
    advantages: Tensor
    """Advantages used in the loss: of the row, or of each token."""
    old: Tensor | None
    """Old log-probs of an audited batch, NaN for tokens that could not be scored; None if the batch was not audited."""
    first: bool
    """Whether the micro-batch belongs to the first minibatch; then `current` is of the version trained at."""
    passes: NDArray[np.int32] | None = None
    """[rows, tokens]: number of the pass that scored the old log-prob, unique over all ranks; see
    proximal/types.py. None if unknown."""

    @property
    def proximal(self) -> Tensor:
        """Proximal log-probs; 0 where untrainable or missing."""
        return self.anchor.logprobs

    @property
    def removed(self) -> Tensor:
        """bool: trainable tokens that are masked or clipped."""
        return torch.stack([self.correction.masked, *self.clipped.values()]).any(0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of training a version, on one rank or merged over all ranks."""

    micro_batches: list[MicroBatchResult]
    method: str
    """Method of the proximal: "exact", or the name of a surrogate."""
    loss: float
    grad_norm: float
    """Largest over the minibatches, before clipping."""
    skipped: int
    """Number of minibatches whose gradient is not finite."""
    active_share: float
    """Share of all ranks' trainable tokens neither masked nor clipped; NaN without any."""
    lr_factor: float = 1.0
    """Smallest factor on the learning rate over the minibatches, from the effective sample size."""
    baseline: float | None = None
    """Mean of VCPO's baseline over the minibatches; None without one."""
    normalizer: float = 1.0
    """Mean over the minibatches of the mean weight that the weights were divided by."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds: proximal, audit, prepare, passes, cut, step, and summary (everything else)."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Values of TrainingState.gauges, by name."""
    empty: int = 0
    """Minibatches without a usable token: they leave the weights and the optimizer unchanged."""
    missed: dict[str, int] = field(default_factory=dict)
    """"reason/policy" -> tokens of all ranks that had no old log-prob, and the policy that was applied to them."""

    rejected: dict[str, str] = field(default_factory=dict)
    """Row, by the name of its trajectory or branch, on which a pass fails -> error text. The training left it out."""

    @property
    def exact(self) -> bool:
        """Whether the proximal is the old policy."""
        return self.method == "exact"


def merge(parts: Sequence[StepResult]) -> StepResult:
    """Merge the results of all ranks. Values that are equal on every rank are taken from rank 0."""
    first = parts[0]
    return StepResult(
        micro_batches=[result for part in parts for result in part.micro_batches],
        method=first.method,
        loss=sum(part.loss for part in parts),
        grad_norm=first.grad_norm,  # norm of the summed gradients, equal on every rank
        skipped=first.skipped,
        active_share=first.active_share,
        lr_factor=first.lr_factor,
        baseline=first.baseline,
        normalizer=first.normalizer,
        seconds=first.seconds,
        gauges=first.gauges,
        empty=first.empty,
        missed=first.missed,
        rejected={name: reason for part in parts for name, reason in part.rejected.items()},
    )
