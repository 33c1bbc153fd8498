"""A moving average of the versions' weights, with its mean age. Plain torch.

    w' = beta w + 1        average' = (beta w / w') average + (1 / w') theta

It starts with w = 1 and the first version, and equals sum beta^(t-k) theta(k) / sum beta^(t-k). The usual form,
beta average + (1 - beta) theta, is biased to the first version. One tick is one version, independent of the number of
optimizer steps.

The average is float32, computed from float32 masters. At a learning rate of 1e-6, a step changes a weight of 1e-2 by
one part in 10,000; a bf16 average resolves one part in 256 and would not change.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Average:
    """The average, on the device of the masters; 4 bytes per parameter."""

    def __init__(
        self, masters: Sequence[Tensor], *, gather: Callable[[list[float]], list[list[float]]] | None = None
    ) -> None:
        """Start with this version. Raises ValueError unless the masters are float32.

        gather: if the masters are this rank's shards: returns the numbers of all ranks, in rank order. The means are
        then shards, too, which the checkpoint holds beside those of the policy, and not in `state`.
        """
        if narrow := sorted({str(master.dtype) for master in masters if master.dtype != torch.float32}):
            raise ValueError(f"weights of type {', '.join(narrow)} cannot be averaged; pass the float32 masters")
        self._gather = gather
        self.means = [master.detach().clone() for master in masters]
        self.weight = 1.0
        """w: sum of the versions' weights, relative to the newest."""
        self.center_of_mass = 0.0
        """Mean age of the averaged versions, in versions."""
        self.versions = 1
        """Versions added since the start or the last reset."""

    @torch.no_grad()
    def take(self, masters: Sequence[Tensor], *, decay: float) -> None:
        """Add a version. decay: beta in [0, 1), which may differ between calls. Raises ValueError for another beta."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1)")
        if decay == 0:
            self._replace_average(masters)  # a copy, because 0 times a value that is not finite is NaN
        else:
            weight = decay * self.weight + 1
            for mean, master in zip(self.means, masters, strict=True):
                mean.lerp_(master, 1 / weight)  # keeps a constant weight bit for bit
            self.center_of_mass = (1 - 1 / weight) * (self.center_of_mass + 1)
            self.weight = weight
        self.versions += 1

    def reset(self, masters: Sequence[Tensor], *, age: int = 0) -> None:
        """Restart the average with these weights. age: of the weights, in versions."""
        self._replace_average(masters)
        self.versions, self.center_of_mass = 1, float(age)

    def distance(self, masters: Sequence[Tensor]) -> float:
        """Return |theta - average| / |theta| over all weights (Euclidean norms); 0 if all weights are 0.

        All ranks must call it if the weights are shards.
        """
        apart = math.hypot(*(_norm(master - mean) for master, mean in zip(masters, self.means, strict=True)))
        size = math.hypot(*(_norm(master) for master in masters))
        if self._gather is not None:  # ranks that hold the same shard count equally often in both
            apart, size = (math.hypot(*of_ranks) for of_ranks in zip(*self._gather([apart, size]), strict=True))
        return apart / size if size else 0.0

    def state(self) -> dict[str, Tensor]:
        """Return the means (without copies) and the clock, for a checkpoint."""
        clock = [self.weight, self.center_of_mass, float(self.versions)]
        return self._own_means() | {"clock": torch.tensor(clock, dtype=torch.float64)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore a checkpoint exactly. Raises ValueError if its names, shapes or types differ."""
        refuse_others(self.state(), tensors)
        for name, mean in self._own_means().items():
            mean.copy_(tensors[name])
        self.weight, self.center_of_mass, versions = tensors["clock"].tolist()
        self.versions = int(versions)

    def _own_means(self) -> dict[str, Tensor]:
        return {} if self._gather is not None else {f"mean.{i}": mean for i, mean in enumerate(self.means)}

    @torch.no_grad()
    def _replace_average(self, masters: Sequence[Tensor]) -> None:
        for mean, master in zip(self.means, masters, strict=True):
            mean.copy_(master)
        self.weight, self.center_of_mass = 1.0, 0.0


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))


def refuse_others(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint holds exactly these tensors, with these shapes and types."""
    if missing := sorted(set(wanted) - set(given)):
        raise ValueError(
            f"the checkpoint lacks {', '.join(missing[:3])}: its run had no such average, and resuming would reset the "
            f"average; keep the learner.proximal section that wrote the checkpoint"
        )
    if unknown := sorted(set(given) - set(wanted)):
        raise ValueError(
            f"the checkpoint holds {', '.join(unknown[:3])}, which is of another learner.proximal or a larger model"
        )
    for name, tensor in wanted.items():
        other = given[name]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} is {other.dtype} {tuple(other.shape)} in the checkpoint, but {tensor.dtype} "
                f"{tuple(tensor.shape)} in this model"
            )


def window_decay(window: int) -> float:
    """Return beta = W / (W + 2): the mean age of the average is then W / 2, the middle of a window of W versions.

    >>> [round(window_decay(window), 4) for window in (0, 1, 2, 4, 8, 16)]
    [0.0, 0.3333, 0.5, 0.6667, 0.8, 0.8889]
    """
    if window < 0:
        raise ValueError(f"window is {window} versions; it must be at least 0")
    return window / (window + 2)


def staleness_decay(mean_staleness: float) -> float:
    """Return beta = d / (1 + d): the mean age of the average is then d versions.

    >>> staleness_decay(2.0) == window_decay(4)
    True
    """
    if mean_staleness < 0:
        raise ValueError(f"the mean staleness is {mean_staleness}; it must be at least 0")
    return mean_staleness / (1 + mean_staleness)
