"""Permission for the CPU's matrix tiles (AMX), and how it is passed to vLLM."""

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
def test_amx_is_requested_only_when_supported_and_wanted(
    supported: bool, wanted: bool, permitted: bool, expected: Amx
) -> None:
    asked = []

    def ask() -> bool:
        asked.append(True)
        return permitted

    assert decide(supported=supported, wanted=wanted, ask=ask) is expected
    assert bool(asked) == (supported and wanted), "the kernel gets a request only if AMX is supported and wanted"


def refused_and_settled(sender: Connection) -> None:
    if platform.machine() == "x86_64":
        refuse()
    sender.send((configure().name, torch.cpu._is_amx_tile_supported()))


def test_vllm_does_not_use_amx_if_the_kernel_refuses_it() -> None:
    """Runs in its own process, because the refusal lasts for the life of a process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=refused_and_settled, args=(sender,))
    process.start()
    sender.close()  # the pipe stays empty if the process dies
    expected = Amx.REFUSED if torch.cpu._is_amx_tile_supported() else Amx.ABSENT
    assert receiver.recv() == (expected.name, False)
    process.join()
