"""Sums over the minibatches of a version, and over the ranks. Pure."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import Correction
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.entropy import TURNS, Turns, turn_entropy
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.proximal.types import ProximalValues
from palimpsest.services.learner.training.results import MicroBatchResult


@dataclass(eq=False)
class MicroBatchPass:
    """A micro-batch after its passes, before the optimizer step. Tensors are [rows, tokens] on the learner's device."""

    batch: PaddedBatch
    anchor: ProximalValues
    inputs: Inputs
    entropy: Tensor
    correction: Correction
    clipped: dict[str, Tensor]
    old: Tensor | None
    """See MicroBatchResult."""
    advantages: Tensor
    """Advantages in the loss. With VCPO's baseline, the loss is computed with 1 and this is R - b afterwards."""
    usable: int
    """Number of tokens with a loss: trainable, not removed by a mask, all log-probs finite."""
    passes: NDArray[np.int32] | None = None
    """See Exact."""

    def result(self, *, first: bool, ranks: ProcessGroup) -> MicroBatchResult:
        """Return the result on the CPU. first: whether the micro-batch belongs to the first minibatch."""
        anchor, passes = self.anchor, self.passes
        return MicroBatchResult(
            batch=self.batch,
            anchor=ProximalValues(anchor.logprobs.cpu(), anchor.missing.cpu(), anchor.exact.cpu()),
            current=self.inputs.current.detach().cpu(),
            entropy=self.entropy.cpu(),
            correction=self.correction.cpu(),
            clipped={cause: where.cpu() for cause, where in self.clipped.items()},
            advantages=self.advantages.cpu(),
            old=self.old,
            first=first,
            passes=None if passes is None else np.where(passes >= 0, passes * ranks.shares + ranks.share, passes),
        )


@dataclass
class StepAccumulator:
    """Sums over a version's passes and optimizer steps on one rank."""

    loss: float = 0.0
    norms: list[float] = field(default_factory=list)
    """Gradient norm of each minibatch, before clipping."""
    lr_factors: list[float] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)
    normalizers: list[float] = field(default_factory=list)
    """Mean weight of each minibatch."""
    empty: int = 0
    """Minibatches without a usable token, which took no optimizer step."""
    divergence: float = 0.0
    """Sum of KL(current || start) over usable tokens, nats; 0 unless it is in the loss."""
    taus: list[float] = field(default_factory=list)
    """M2PO's tau of each minibatch."""
    squared_deviation: float = 0.0
    """Sum of (r - 1)^2 over usable tokens."""
    usable: int = 0
    """Number of usable tokens."""

    def restore(self, earlier: "StepAccumulator") -> None:
        """Take over the sums of an earlier time."""
        for each in fields(self):
            setattr(self, each.name, getattr(earlier, each.name))

    def add_pass(self, loss: Tensor, squared_deviations: Tensor, usable: Tensor) -> None:
        """Add a micro-batch. loss: scalar; squared_deviations, usable (bool): [rows, tokens]."""
        self.loss += float(loss.detach())
        self.squared_deviation += float(squared_deviations[usable].double().sum())
        self.usable += int(usable.sum())

    @property
    def grad_norm(self) -> float:
        """Largest finite norm; NaN without any."""
        return max(self._finite_norms, default=float("nan"))

    @property
    def skipped(self) -> int:
        """Number of minibatches whose norm is not finite."""
        return len(self.norms) - len(self._finite_norms)

    @property
    def baseline(self) -> float | None:
        """Mean baseline over the minibatches; None without any."""
        return sum(self.baselines) / len(self.baselines) if self.baselines else None

    @property
    def normalizer(self) -> float:
        """Mean normalizer over the minibatches."""
        return sum(self.normalizers) / len(self.normalizers)

    @property
    def lr_factor(self) -> float:
        """Smallest factor on the learning rate; NaN without an optimizer step."""
        return min(self.lr_factors, default=float("nan"))

    def gauges(self) -> dict[str, float]:
        """Return values for the metrics, by name."""
        return {"m2po_tau": sum(self.taus) / len(self.taus)} if self.taus else {}

    def mean_loss(self, minibatches: int) -> float:
        """Mean loss of the minibatches with a usable token; NaN without any. minibatches: their total number."""
        return self.loss / (minibatches - self.empty) if minibatches > self.empty else float("nan")

    @property
    def _finite_norms(self) -> list[float]:
        return [norm for norm in self.norms if np.isfinite(norm)]


@dataclass(frozen=True, slots=True)
class TokenTotals:
    """Sums over a version's tokens and trajectories, of one rank or of all."""

    tokens: int = 0
    """Trainable tokens."""
    active: int = 0
    """Trainable tokens neither masked nor clipped."""
    staleness: int = 0
    """Sum over the trainable tokens, in versions."""
    squared_deviation: float = 0.0
    """Sum of (r - 1)^2 over usable tokens."""
    usable: int = 0
    entropy: float = 0.0
    """Sum over trajectories of the mean entropy of their tokens, nats."""
    trajectories: int = 0
    """Number of trajectories with such a mean."""
    unmasked: int = 0
    """Trainable tokens that the corrections leave in the loss."""
    divergence: float = 0.0
    """Sum of KL(current || start) over usable tokens, nats."""
    turns: Turns = field(default_factory=lambda: np.zeros((TURNS, 2)), compare=False)
    """Sum over trajectories of the mean entropy of each turn, and their number."""

    @classmethod
    def of(cls, results: Sequence[MicroBatchResult], now: Version, sums: StepAccumulator) -> "TokenTotals":
        """Return the totals of one rank's micro-batches, trained at version `now`."""
        tokens = active = staleness = trajectories = unmasked = 0
        entropy, turns = 0.0, np.zeros((TURNS, 2))
        for result in results:
            mask = result.batch.mask
            tokens += int(mask.sum())
            active += int((mask & ~result.removed.numpy()).sum())
            staleness += int((now - result.batch.versions[mask]).astype(np.int64).sum())
            known = torch.from_numpy(mask) & torch.isfinite(result.entropy)
            has = known.any(-1)
            means = torch.where(known, result.entropy, 0.0).sum(-1) / known.sum(-1).clamp(min=1)
            entropy += float(means[has].double().sum())
            trajectories += int(has.sum())
            unmasked += int((mask & ~result.correction.masked.numpy()).sum())
            of_turns, present = turn_entropy(result.entropy.double(), torch.from_numpy(mask))
            turns += torch.stack([of_turns.sum(0), present.sum(0).double()], dim=1).numpy()
        return cls(
            tokens,
            active,
            staleness,
            sums.squared_deviation,
            sums.usable,
            entropy,
            trajectories,
            unmasked,
            sums.divergence,
            turns,
        )

    @classmethod
    def summed(cls, parts: "Sequence[TokenTotals]") -> "TokenTotals":
        """Return the sums over the ranks."""
        return cls(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))

    @property
    def active_share(self) -> float:
        """Share of the trainable tokens neither masked nor clipped; NaN without any."""
        return self.active / self.tokens if self.tokens else float("nan")

    @property
    def unmasked_share(self) -> float:
        """Share of the trainable tokens that the corrections leave in the loss; NaN without any."""
        return self.unmasked / self.tokens if self.tokens else float("nan")

    @property
    def mean_divergence(self) -> float:
        """Mean KL(current || start) over usable tokens, nats; NaN without any."""
        return self.divergence / self.usable if self.usable else float("nan")

    @property
    def mean_turns(self) -> Turns:
        """Mean entropy of each turn over trajectories, [TURNS]; NaN for a turn without any."""
        total, count = self.turns.T
        means: Turns = np.divide(total, count, out=np.full(TURNS, np.nan), where=count > 0)
        return means

    @property
    def mean_staleness(self) -> float:
        """Mean staleness of the trainable tokens, in versions; NaN without any."""
        return self.staleness / self.tokens if self.tokens else float("nan")

    @property
    def mean_squared_deviation(self) -> float:
        """Mean of (r - 1)^2 over usable tokens; NaN without any."""
        return self.squared_deviation / self.usable if self.usable else float("nan")

    @property
    def mean_entropy(self) -> float | None:
        """Mean over trajectories of the mean entropy of their tokens, nats; None without any."""
        return self.entropy / self.trajectories if self.trajectories else None
