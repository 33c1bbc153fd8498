"""What a run needs on the GPUs of a machine, and what does not fit. Pure."""

from dataclasses import dataclass

from palimpsest.plan.causes import Memory, gib
from palimpsest.plan.engine_memory import EngineMemory
from palimpsest.plan.gpus import Gpus, Needed
from palimpsest.plan.rehearsal import ModelSize, PassShape


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs."""

    gpus: Gpus
    model: ModelSize
    shape: PassShape
    learner: Memory
    engine: EngineMemory | None
    """None without a vLLM engine."""
    needed: Needed
    learner_room: int
    """Bytes of a GPU for the tensors of a rank that computes, beside engines and replicas on the same GPU."""
    awake_room: int
    """The same while it waits for a batch: less, if the engines sleep while it computes."""
    remedies: tuple[tuple[tuple[str, ...], int], ...]
    """Keys with values that lower the learner's peak, and the peak with them in bytes; empty if the learner fits."""
    live_tokens: int
    """Tokens of rollout.max_live trajectories of the greatest length."""

    @property
    def asleep_in_host(self) -> int:
        """Bytes of the host's memory for the weights of all engines of the machine while they sleep."""
        return self.engine.weights * self.needed.engines if self.engine is not None and self.needed.asleep else 0

    @property
    def fits(self) -> bool:
        """Whether every process fits its GPUs."""
        return not self.misfits()

    def misfits(self) -> list[str]:
        """Return a sentence for each thing that does not fit."""
        sentences = []
        if self.needed.refused is not None:
            sentences.append(f"Does not fit: {self.needed.refused}.")
        if (over := self.learner.peak - self.learner_room) > 0:
            keys = sorted({key for cause in (*self.learner.held, *self.learner.largest.causes) for key in cause.keys})
            sentences.append(
                f"Does not fit: a rank of the learner needs {gib(over)} GiB more than a GPU has. Keys that change it: "
                f"{', '.join(keys)}."
            )
        if (over := self.learner.static - self.awake_room) > 0 and self.needed.asleep:
            sentences.append(
                f"Does not fit: what a rank of the learner holds all the time needs {gib(over)} GiB more than engines "
                f"leave that are awake. Lower rollout.engine.gpu_memory_utilization."
            )
        if self.engine is not None and self.engine.cache <= 0:
            sentences.append(
                f"Does not fit: the engine's weights need {gib(self.engine.weights)} GiB of each GPU, more than "
                f"rollout.engine.gpu_memory_utilization gives. Raise rollout.engine.tensor_parallel."
            )
        return sentences
