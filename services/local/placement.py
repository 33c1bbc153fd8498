"""Which GPUs each process of a run on one machine uses. Pure.

Each process sees only its own GPUs (CUDA_VISIBLE_DEVICES), so that two processes meet on a GPU only if engines and
learner use it by turns (rollout.engine.sleep), the run lists it for both, or the machine has a single one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.local.visible_gpus import VARIABLE

ENGINES, LEARNER, REPLICAS = "engines", "learner", "replicas"
BY_TURNS = ", by turns on the same ones"
ENGINES_ALONE, ENGINES_BESIDE = 0.9, 0.5
"""Maximum share of a GPU for the engines on it: several engines alone or asleep while the learner computes, and engines
beside a learner or a replica."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Process name -> its GPUs, as CUDA_VISIBLE_DEVICES lists them. A process without an entry sees all GPUs."""

    gpus: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def variables(self, name: str) -> dict[str, str]:
        """Return the environment variables of a process."""
        return {VARIABLE: ",".join(self.gpus[name])} if name in self.gpus else {}


def place(config: RunConfig, visible: Sequence[str]) -> Placement:
    """Assign the visible GPUs. Without any, no process gets an entry. Raises UserError if the run does not fit them, or
    if its ranks cannot share rows."""
    ranks, together = config.local.learner_ranks, config.learner.context_parallel
    if ranks % together:
        raise UserError(
            f"learner.context_parallel is {together}, and local.learner_ranks is {ranks}, which it does not divide: "
            f"change one of them"
        )
    wanted, given = gpus_wanted(config), config.local.gpus.model_dump()
    if not visible:
        if keys := [f"local.gpus.{kind}" for kind, numbers in given.items() if numbers is not None]:
            raise UserError(f"{', '.join(keys)}: no GPU is visible here (nvidia-smi, {VARIABLE}); remove the key")
        return Placement()
    by_hand = any(each is not None for each in given.values())
    numbers = (
        _given(wanted, given, visible) if by_hand else _default(wanted, len(visible), by_turns=takes_turns(config))
    )
    _refuse_full(config, numbers)
    return Placement(
        {
            name: tuple(visible[number] for number in own)
            for kind, processes in wanted.items()
            for name, own in zip(processes, _shares(numbers[kind], list(processes.values())), strict=True)
        }
    )


def gpus_wanted(config: RunConfig) -> dict[str, dict[str, int]]:
    """Return kind -> process -> number of GPUs. A scripted engine needs none."""
    engine, local = config.rollout.engine, config.local
    width = engine.tensor_parallel if isinstance(engine, VllmEngineConfig) else 0
    return {
        ENGINES: {f"worker-{i}": width for i in range(local.rollout_workers)},
        LEARNER: {LEARNER: local.learner_ranks},
        REPLICAS: {f"replica-{i}": 1 for i in range(config.replica_count)},
    }


def takes_turns(config: RunConfig) -> bool:
    """Whether engines and ranks of the learner use the same GPUs by turns, if the run assigns none by hand."""
    engine = config.rollout.engine
    return isinstance(engine, VllmEngineConfig) and engine.sleep


def needed_gpus(numbers: Mapping[str, int], *, by_turns: bool) -> int:
    """Return the number of GPUs with one process on each, or by turns an engine and a rank. numbers: kind -> GPUs."""
    if by_turns:
        return max(numbers[ENGINES], numbers[LEARNER]) + numbers[REPLICAS]
    return sum(numbers.values())


def _default(wanted: Mapping[str, Mapping[str, int]], visible: int, *, by_turns: bool) -> dict[str, list[int]]:
    """GPUs in the order engines, learner, replicas; by turns, those of engines and learner both begin with GPU 0. A
    single GPU is shared. Raises UserError."""
    numbers = {kind: sum(processes.values()) for kind, processes in wanted.items()}
    needed = needed_gpus(numbers, by_turns=by_turns)
    if visible == 1 and all(number <= 1 for processes in wanted.values() for number in processes.values()):
        return {kind: [0] * number for kind, number in numbers.items()}
    if needed > visible:
        parts = ", ".join(f"{number} for {_text(kind)}" for kind, number in numbers.items() if number)
        raise UserError(
            f"the run needs {needed} GPUs ({parts}{BY_TURNS if by_turns else ''}), and {visible} "
            f"{'is' if visible == 1 else 'are'} visible: lower "
            f"local.rollout_workers, local.learner_ranks, local.replicas or rollout.engine.tensor_parallel, or let "
            f"processes share GPUs with local.gpus"
        )
    result, end = {}, 0
    for kind, number in numbers.items():
        first = 0 if by_turns and kind == LEARNER else end
        result[kind] = list(range(first, first + number))
        end = max(end, first + number)
    return result


def _given(
    wanted: Mapping[str, Mapping[str, int]], given: Mapping[str, Sequence[int] | None], visible: Sequence[str]
) -> dict[str, list[int]]:
    """The GPUs of local.gpus. Every kind of process that needs one must have its key. Raises UserError."""
    result = {}
    for kind, processes in wanted.items():
        needed, numbers, key = sum(processes.values()), given[kind], f"local.gpus.{kind}"
        if numbers is None and needed:
            raise UserError(f"{key} is missing: {_text(kind)} need {needed}, and the run sets other keys of local.gpus")
        numbers = numbers or ()
        if len(numbers) != needed:
            raise UserError(f"{key} has {len(numbers)} GPUs, but {_text(kind)} need {needed} on this machine")
        if absent := [number for number in numbers if number >= len(visible)]:
            raise UserError(
                f"{key} has GPU {absent[0]}, but {len(visible)} are visible: their numbers are 0 to {len(visible) - 1}"
            )
        for own in _shares(list(numbers), list(processes.values())):
            if len(set(own)) < len(own):
                raise UserError(f"{key} gives one process GPU {own[0]} more than once: {list(numbers)}")
        result[kind] = list(numbers)
    return result


def _refuse_full(config: RunConfig, numbers: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError if the engines leave no room on a GPU that they share."""
    engine = config.rollout.engine
    if not isinstance(engine, VllmEngineConfig):
        return
    for gpu in sorted(set(numbers[ENGINES])):
        engines = list(numbers[ENGINES]).count(gpu)
        others = [_text(kind) for kind in (LEARNER, REPLICAS) if gpu in numbers[kind]]
        most = (ENGINES_BESIDE if others and not engine.sleep else ENGINES_ALONE) / engines
        if (engines > 1 or others) and engine.gpu_memory_utilization > most:
            sharing = " and ".join([f"{engines} engine{'s' if engines > 1 else ''}", *others])
            raise UserError(
                f"GPU {gpu} is shared by {sharing}, but rollout.engine.gpu_memory_utilization is "
                f"{engine.gpu_memory_utilization}: set it to {most:.2g} or less (`palimpsest plan` prints what the "
                f"learner needs), or give the processes other GPUs with local.gpus"
            )


def _shares(numbers: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Split numbers into parts of these sizes."""
    parts, first = [], 0
    for size in sizes:
        parts.append(list(numbers[first : first + size]))
        first += size
    return parts


def _text(kind: str) -> str:
    return {ENGINES: "the engines", LEARNER: "the ranks of the learner", REPLICAS: "the replicas"}[kind]
