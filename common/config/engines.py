"""Keys of the inference engine."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import InterruptionProximal
from palimpsest.common.config.section import Positive, PositiveFloat, Section, Share


class VllmEngineConfig(Section):
    """The vLLM engine."""

    kind: Literal["vllm"] = "vllm"
    max_concurrent_tokens: Positive = 8192
    """Maximum number of tokens in one engine step."""
    kv_cache_gib: PositiveFloat = 1.0
    """Size of the KV cache in GiB (CPU engine)."""
    gpu_memory_utilization: Share = 0.85
    """Fraction of the GPU memory that vLLM may use (GPU engine)."""
    tensor_parallel: Positive = 1
    """Number of GPUs that share one model; of the CPU engine, the number of processes."""
    expert_parallel: bool = False
    """Divide the experts of a mixture of experts over the GPUs of `tensor_parallel`, so that each GPU holds whole
    experts. `false`: each GPU holds a slice of every expert."""
    sleep: bool = False
    """Sleep while the learner trains, on GPUs that both share: at each cut, before the learner computes, the engine
    frees the memory of its weights and its KV cache, and takes it back when the next version is announced. Needs
    learner.proximal.kind = "interruption" (docs/memory.md)."""
    compile: bool = False
    """Compile the graph of the model. The engine starts slower and runs large models faster."""
    threads: Positive = 1
    """CPU threads of the forward pass (CPU engine)."""
    amx: bool = True
    """Use AMX, the matrix instructions of the CPU, if the CPU has them and the kernel permits them (CPU engine)."""

    @model_validator(mode="after")
    def _experts_have_gpus(self) -> "VllmEngineConfig":
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "rollout.engine.expert_parallel is true, but rollout.engine.tensor_parallel is 1: one GPU holds all "
                "experts. Raise rollout.engine.tensor_parallel, or remove rollout.engine.expert_parallel"
            )
        return self


class ScriptedEngineConfig(Section):
    """An engine without a model, for tests: it answers from a list of texts."""

    kind: Literal["scripted"]
    texts: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """The answers. The trajectory id and the turn select one for each model message."""
    tokens_per_s: PositiveFloat = 2000.0
    """Sampling speed of each request, in tokens per second."""
    sleep: bool = False
    """Sleep while the learner trains, as the vLLM engine does."""


def refusal_of_sleep(learner: LearnerConfig) -> str | None:
    """Return why engines cannot sleep while this learner trains, and what to change; None: they can."""
    if not isinstance(learner.proximal, InterruptionProximal):
        return (
            f'learner.proximal.kind is "{learner.proximal.kind}", which stops no engine before the learner computes: '
            f'set learner.proximal.kind = "interruption"'
        )
    if learner.proximal.hold_s is not None:
        return (
            "learner.proximal.hold_s would wake an engine while the learner has the memory: remove "
            "learner.proximal.hold_s"
        )
    if learner.publishing == "background":
        return (
            'learner.publishing is "background", which publishes while the learner computes for the next version: set '
            'learner.publishing = "inline"'
        )
    return None
