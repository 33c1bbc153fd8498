"""Starts the processes of many vLLM engines from one that has imported vLLM, which saves 15 s of a core each.

Each engine still has a process of its own: vLLM keeps state per process (registered layers, compiled kernels, caches of
packed experts), so two engines in one process are not two fresh engines.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palimpsest.services.rollout.engine.crash_evidence import VARIABLE
from tests.runs.vllm_engine import LOG

IMPORTED = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.model_loader")


@contextmanager
def forked_engines(folder: Path) -> Iterator[None]:
    """Fork the engines that start in the block. folder: of their crash log, as in `running_engine`."""
    with pytest.MonkeyPatch.context() as patch:
        # the fork server passes its own environment to its children, not that of the moment
        patch.setenv(VARIABLE, str((folder / LOG).absolute()))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        patch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: context)
        yield
