"""Decides whether vLLM uses the matrix tiles (AMX) of the CPU.

Linux requires a process to request permission for the tiles (arch_prctl with ARCH_REQ_XCOMP_PERM). vLLM's CPU attention
and its small matrix products use them on every CPU that has them, without a request, so the first inference request
ends the engine's process with SIGILL. oneDNN requests the permission itself and works without the tiles if the kernel
refuses.
"""

import os
from collections.abc import Callable
from enum import StrEnum

VARIABLE = "PALIMPSEST_ENGINE_AMX"
"""Environment variable of an engine's process. `off`: `rollout.engine.amx` is false."""


class Amx(StrEnum):
    """How an engine uses AMX, as a text for the log."""

    ABSENT = "the CPU has no AMX"
    USED = "used"
    REFUSED = "refused by the kernel or the container; the engine runs without AMX"
    OFF = "switched off by rollout.engine.amx; the engine runs without AMX"


def decide(*, supported: bool, wanted: bool, ask: Callable[[], bool]) -> Amx:
    """Return how to use AMX. `ask` requests the permission and returns whether the kernel granted it; called if needed.

    >>> decide(supported=True, wanted=True, ask=lambda: False).name
    'REFUSED'
    """
    if not supported:
        return Amx.ABSENT
    if not wanted:
        return Amx.OFF
    return Amx.USED if ask() else Amx.REFUSED


def configure() -> Amx:
    """Request the tiles for this process, or disable them in vLLM. Call before vLLM loads a model."""
    import torch

    found = decide(
        supported=torch.cpu._is_amx_tile_supported(),
        wanted=os.environ.get(VARIABLE) != "off",
        ask=torch.cpu._init_amx,
    )
    if found in (Amx.REFUSED, Amx.OFF):
        torch.cpu._is_amx_tile_supported = _unsupported  # vLLM calls this whenever it chooses a kernel
    return found


def _unsupported() -> bool:
    return False
