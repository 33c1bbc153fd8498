"""The GPUs of a machine and the processes of a run on them. Pure."""

import re
from dataclasses import dataclass

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.plan.causes import GIB
from palimpsest.services.local.placement import (
    BY_TURNS,
    ENGINES,
    LEARNER,
    REPLICAS,
    gpus_wanted,
    needed_gpus,
    place,
    takes_turns,
)

CONTEXT = GIB
"""Bytes of a GPU that a process needs besides its tensors: CUDA context, kernels, communication buffers. Assumed."""
_FORM = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5}(?:\.[0-9]{1,6})?)")
"""Up to six digits each: the GPUs are listed one by one."""


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

    def usable_beside(self, share: float, replicas: int) -> int:
        """Bytes of a GPU for the tensors of a process beside engines that take a share of the GPU, and beside replicas
        that need so many bytes."""
        return self.usable - int(share * self.gib * GIB) - replicas

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
    """GPUs that the processes of a run want, and whether the machine can give them."""

    engines: int
    ranks: int
    replicas: int
    refused: str | None = None
    """Why `palimpsest run` would refuse to start on these GPUs."""
    engine_share: float = 0.0
    """Largest share of a GPU of the learner that engines on it take."""
    replicas_beside: int = 0
    """Largest number of replicas on a GPU of the learner."""
    asleep: int = 0
    """Largest number of engines on a GPU of the learner that sleep while it computes."""
    by_turns: bool = False
    """Whether engines and ranks of the learner use the same GPUs by turns."""

    @property
    def number(self) -> int:
        """All of them, one process on each, or by turns an engine and a rank."""
        numbers = {ENGINES: self.engines, LEARNER: self.ranks, REPLICAS: self.replicas}
        return needed_gpus(numbers, by_turns=self.by_turns)

    def __str__(self) -> str:
        parts = [
            f"{number} for {name}"
            for name, number in (("engines", self.engines), ("the learner", self.ranks), ("replicas", self.replicas))
            if number
        ]
        shared = not self.by_turns and (self.engine_share or self.replicas_beside)
        turns, share = BY_TURNS if self.by_turns else "", ", and processes share one" if shared else ""
        return f"{self.number} ({', '.join(parts)}{turns}){share}"


def needed(config: RunConfig, gpus: Gpus) -> Needed:
    """Place the processes as `palimpsest run` does, and return the GPUs that they need."""
    wanted = gpus_wanted(config)
    numbers = {kind: sum(processes.values()) for kind, processes in wanted.items()}
    refused, share, beside, asleep = None, 0.0, 0, 0
    try:
        placed = place(config, [str(number) for number in range(gpus.number)]).gpus
    except UserError as error:
        refused = str(error)
    else:
        engine = config.rollout.engine
        used = {kind: [gpu for name in wanted[kind] for gpu in placed[name]] for kind in (ENGINES, REPLICAS)}
        beside = max(used[REPLICAS].count(gpu) for gpu in placed[LEARNER])
        if isinstance(engine, VllmEngineConfig):
            engines = max(used[ENGINES].count(gpu) for gpu in placed[LEARNER])
            share, asleep = engine.gpu_memory_utilization * engines, engines if engine.sleep else 0
    by_hand = any(each is not None for each in config.local.gpus.model_dump().values())
    return Needed(
        numbers[ENGINES], numbers[LEARNER], numbers[REPLICAS], refused, share, beside, asleep,
        by_turns=takes_turns(config) and not by_hand,
    )  # fmt: skip
