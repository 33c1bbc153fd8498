"""The `local` section: the processes of a run on one machine. docs/configuration.md is generated from it."""

from typing import Annotated

from pydantic import Field

from palimpsest.common.config.section import Positive, Section

Gpu = Annotated[int, Field(ge=0)]
GpuList = Annotated[tuple[Gpu, ...], Field(strict=False)]


class GpusConfig(Section):
    """GPUs of each kind of process. GPUs are numbered from 0 among those that `palimpsest run` sees
    (CUDA_VISIBLE_DEVICES). Without any of these keys each process gets GPUs of its own, but engines and learner share
    theirs with rollout.engine.sleep, and all processes the GPU of a machine that has one (docs/memory.md)."""

    engines: GpuList | None = None
    """GPUs of the inference engines: rollout.engine.tensor_parallel for each worker, in the order of the workers."""
    learner: GpuList | None = None
    """GPUs of the learner, one for each rank."""
    replicas: GpuList | None = None
    """GPUs of the replicas, one for each."""


class LocalConfig(Section):
    """Processes of a run on one machine (`palimpsest run`)."""

    rollout_workers: Positive = 1
    """Rollout worker processes."""
    learner_ranks: Positive = 1
    """Learner processes. torchrun launches them if there are several."""
    replicas: Annotated[int, Field(ge=0)] = 0
    """Replica processes, if learner.proximal.kind is "replica". At least one is started then."""
    gpus: GpusConfig = GpusConfig()
    restarts: Annotated[int, Field(ge=0)] = 5
    """Maximum number of consecutive restarts of a process that crashes before it has done any work. The run ends after
    them, and also when the same crash occurs three times in a row."""
