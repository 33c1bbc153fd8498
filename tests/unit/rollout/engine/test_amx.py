"""What an engine does about the CPU's matrix tiles."""

import multiprocessing
import platform
from multiprocessing.connection import Connection

import pytest
import torch

from palimpsest.services.rollout.engine.amx import Amx, configure, decide
from tests.processes.refuse_amx import refuse


@pytest.mark.parametrize(
    ("supported", "wanted", "permitted", "expected"),
    [
        (False, True, False, Amx.ABSENT),
        (False, False, False, Amx.ABSENT),
        (True, True, True, Amx.USED),
        (True, True, False, Amx.REFUSED),
        (True, False, True, Amx.OFF),
    ],
)
def test_what_is_done_about_amx(supported: bool, wanted: bool, permitted: bool, expected: Amx) -> None:
    asked = []

    def ask() -> bool:
        asked.append(True)
        return permitted

    assert decide(supported=supported, wanted=wanted, ask=ask) is expected
    assert bool(asked) == (supported and wanted), "the kernel is asked only where the answer matters"


def refused_and_settled(told: Connection) -> None:
    if platform.machine() == "x86_64":
        refuse()
    told.send((configure().name, torch.cpu._is_amx_tile_supported()))


def test_where_the_kernel_refuses_the_tiles_vllm_is_told_that_there_are_none() -> None:
    """In a process of its own: the refusal and what follows from it are for good."""
    told, tells = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=refused_and_settled, args=(tells,))
    process.start()
    tells.close()  # if it dies, nothing comes
    expected = Amx.REFUSED if torch.cpu._is_amx_tile_supported() else Amx.ABSENT
    assert told.recv() == (expected.name, False)
    process.join()
