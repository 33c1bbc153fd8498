"""The GPUs of a machine and the processes of a run on them. Pure."""

import re
from dataclasses import dataclass

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.plan.causes import GIB
from palimpsest.services.local.placement import LEARNER, gpus_wanted

CONTEXT = GIB
"""Bytes of a GPU that a process needs besides its tensors: CUDA context, kernels, communication buffers. Assumed."""
_FORM = re.compile(r"([1-9]\d*)x([1-9]\d*(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one kind."""

    number: int
    gib: float
    """Memory of each, in GiB."""

    @property
    def usable(self) -> int:
        """Bytes of a GPU for the tensors of a process."""
        return int(self.gib * GIB) - CONTEXT

    def __str__(self) -> str:
        return f"{self.number}x{self.gib:g}"


def parse(text: str) -> Gpus:
    """Return the GPUs of NUMBERxGIB, for example 8x80. Raises UserError."""
    if match := _FORM.fullmatch(text):
        return Gpus(int(match[1]), float(match[2]))
    raise UserError(
        f"--gpus={text} is not NUMBERxGIB, for example --gpus=8x80 for eight GPUs with 80 GiB each of a machine"
    )


@dataclass(frozen=True, slots=True)
class Needed:
    """GPUs that the processes of a run need, one process on each."""

    engines: int
    ranks: int
    replicas: int

    @property
    def number(self) -> int:
        """All of them."""
        return self.engines + self.ranks + self.replicas

    def __str__(self) -> str:
        parts = [
            f"{number} for {name}"
            for name, number in (("engines", self.engines), ("the learner", self.ranks), ("replicas", self.replicas))
            if number
        ]
        return f"{self.number} ({', '.join(parts)})"


def needed(config: RunConfig) -> Needed:
    """Return the GPUs that `palimpsest run` needs."""
    wanted = {kind: sum(processes.values()) for kind, processes in gpus_wanted(config).items()}
    return Needed(engines=wanted["engines"], ranks=wanted[LEARNER], replicas=wanted["replicas"])
