"""Whether vLLM may use the matrix tiles (AMX) of the CPU.

Linux lets a process use the tiles only after it has asked for them (arch_prctl with ARCH_REQ_XCOMP_PERM). vLLM's CPU
attention and its small matrix products use them wherever the CPU has them and do not ask, so that the first request
ends the engine's process with SIGILL. oneDNN asks for itself and does without where it is refused.
"""

import os
from collections.abc import Callable
from enum import StrEnum

VARIABLE = "PALIMPSEST_ENGINE_AMX"
"""`off` in the environment of an engine's process: `rollout.engine.amx` is false."""


class Amx(StrEnum):
    """What an engine does about AMX, in words for the log."""

    ABSENT = "the CPU has none"
    USED = "used"
    REFUSED = "refused by the kernel or the container: the engine does without"
    OFF = "switched off by rollout.engine.amx: the engine does without"


def decide(*, supported: bool, wanted: bool, ask: Callable[[], bool]) -> Amx:
    """What to do about AMX. Calls `ask`, which asks the kernel and says whether it agreed, only where that matters.

    >>> decide(supported=True, wanted=True, ask=lambda: False).name
    'REFUSED'
    """
    if not supported:
        return Amx.ABSENT
    if not wanted:
        return Amx.OFF
    return Amx.USED if ask() else Amx.REFUSED


def configure() -> Amx:
    """Ask for the tiles in this process, or make vLLM do without them; before vLLM has loaded a model."""
    import torch

    found = decide(
        supported=torch.cpu._is_amx_tile_supported(),
        wanted=os.environ.get(VARIABLE) != "off",
        ask=torch.cpu._init_amx,
    )
    if found in (Amx.REFUSED, Amx.OFF):
        torch.cpu._is_amx_tile_supported = _unsupported  # what vLLM asks, each time it chooses a kernel
    return found


def _unsupported() -> bool:
    return False
