"""What an engine does about the CPU's matrix tiles."""

import pytest

from services.rollout.amx import Amx, decide


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
