"""A moving average of the versions' weights, and how old it is. Plain torch: no model, no log, no clock.

    w' = beta w + 1        average' = (beta w / w') average + (1 / w') theta

starting with w = 1 and the first version. That is sum beta^(t-k) theta(k) / sum beta^(t-k). In the usual form,
beta average + (1 - beta) theta, the first version would count for more than its share. One tick is one version, however
many optimizer steps that took.

Float32 from float32: at a learning rate of 1e-6 a weight of 1e-2 moves by a part in 10,000 for each step, and a bf16
average, which resolves a part in 256, would stand still.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Average:
    """The average, on the masters' device; 4 bytes for each parameter."""

    def __init__(self, masters: Sequence[Tensor]) -> None:
        """The first version: the average is it. Raises ValueError unless they are float32."""
        if narrow := sorted({str(master.dtype) for master in masters if master.dtype != torch.float32}):
            raise ValueError(f"weights of type {', '.join(narrow)} cannot be averaged: give the float32 masters")
        self.means = [master.detach().clone() for master in masters]
        self.weight = 1.0
        """w: the versions in it, each counted by its share of the newest's."""
        self.center_of_mass = 0.0
        """Mean age of what is in it, in versions."""
        self.versions = 1
        """Taken in since the start or the last reset."""

    @torch.no_grad()
    def take(self, masters: Sequence[Tensor], *, decay: float) -> None:
        """Take a version in. decay: beta, in [0, 1); another one each time is right as well. Raises ValueError."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: an average's beta is in [0, 1)")
        if decay == 0:
            self._replace_average(masters)  # not by arithmetic: 0 times a value that is not finite would stay
        else:
            weight = decay * self.weight + 1
            for mean, master in zip(self.means, masters, strict=True):
                mean.lerp_(master, 1 / weight)  # leaves a weight that does not move bit for bit
            self.center_of_mass = (1 - 1 / weight) * (self.center_of_mass + 1)
            self.weight = weight
        self.versions += 1

    def reset(self, masters: Sequence[Tensor]) -> None:
        """Forget all, and begin again with this version."""
        self._replace_average(masters)
        self.versions = 1

    def distance(self, masters: Sequence[Tensor]) -> float:
        """|theta - average| / |theta| over all weights (Euclidean norms); 0 where all are 0."""
        apart = math.hypot(*(_norm(master - mean) for master, mean in zip(masters, self.means, strict=True)))
        size = math.hypot(*(_norm(master) for master in masters))
        return apart / size if size else 0.0

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the means themselves (no copies), and the clock."""
        clock = [self.weight, self.center_of_mass, float(self.versions)]
        return {f"mean.{i}": mean for i, mean in enumerate(self.means)} | {
            "clock": torch.tensor(clock, dtype=torch.float64)
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly from there. Raises ValueError when it is another model's, or no average's at all."""
        refuse_others(self.state(), tensors)
        for i, mean in enumerate(self.means):
            mean.copy_(tensors[f"mean.{i}"])
        self.weight, self.center_of_mass, versions = tensors["clock"].tolist()
        self.versions = int(versions)

    @torch.no_grad()
    def _replace_average(self, masters: Sequence[Tensor]) -> None:
        for mean, master in zip(self.means, masters, strict=True):
            mean.copy_(master)
        self.weight, self.center_of_mass = 1.0, 0.0


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))


def refuse_others(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a checkpoint holds these tensors, no more and no fewer, with these shapes and types."""
    if missing := sorted(set(wanted) - set(given)):
        raise ValueError(
            f"{', '.join(missing[:3])} is not in it: it is of a run without this average. Going on would be a reset "
            f"that nobody sees; keep the learner.proximal section that the checkpoint was written with"
        )
    if unknown := sorted(set(given) - set(wanted)):
        raise ValueError(f"{', '.join(unknown[:3])} in it belongs to another learner.proximal, or to a larger model")
    for name, tensor in wanted.items():
        other = given[name]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} in it is {other.dtype} {tuple(other.shape)}, here {tensor.dtype} {tuple(tensor.shape)}: it is "
                f"another model's"
            )


def window_decay(window: int) -> float:
    """beta = W / (W + 2): the average's mean age is then W / 2, the middle of a window of W versions.

    >>> [round(window_decay(window), 4) for window in (0, 1, 2, 4, 8, 16)]
    [0.0, 0.3333, 0.5, 0.6667, 0.8, 0.8889]
    """
    if window < 0:
        raise ValueError(f"a window of {window} versions cannot be: give 0 or more")
    return window / (window + 2)


def staleness_decay(mean_staleness: float) -> float:
    """beta = d / (1 + d): the average's mean age is then d, in versions.

    >>> staleness_decay(2.0) == window_decay(4)
    True
    """
    if mean_staleness < 0:
        raise ValueError(f"a mean staleness of {mean_staleness} cannot be: it is 0 or more")
    return mean_staleness / (1 + mean_staleness)
