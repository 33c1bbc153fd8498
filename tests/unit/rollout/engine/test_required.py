"""A live engine that refuses a required step ends its worker with a message and exit code 8; no trajectory is lost."""

from collections.abc import Sequence

import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import CONTROL, TRAJECTORIES, CutReleased, CutRequested, encode
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.port import EngineFailed, SampledTokens, StoredWeights
from palimpsest.services.rollout.engine.required import required
from tests.unit.rollout.engine.test_crash_report import documented
from tests.unit.rollout.working import (
    RUN,
    GatedEngine,
    Place,
    announce,
    committed,
    finished,
    ids,
    messages,
    offer,
    working,
)

ERROR = "weight update: RuntimeError: [enforce fail at alloc_cpu.cpp:124] not enough memory\nyou tried to allocate 9 GB"


class Refuses(GatedEngine):
    """An engine that refuses the named step from now on and stays alive."""

    step = ""

    def _may(self, step: str) -> None:
        if step == self.step:
            raise EngineFailed(ERROR)

    async def pause(self) -> None:
        self._may("pause")
        await super().pause()

    async def load(self, weights: StoredWeights) -> None:
        self._may("load")
        await super().load(weights)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        self._may("score")
        return await super().score(tokens)

    async def partial(self, request: str) -> SampledTokens | None:
        self._may("partial")
        return await super().partial(request)

    async def resume(self) -> None:
        self._may("resume")
        await super().resume()


def request_cut(place: Place, cut: int) -> None:
    place.bus.publish(CONTROL, [Outgoing(RUN, encode(CutRequested(RUN, cut, Version(0), 5.0, 1)))])


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("pause", "an update to version 1"),
        ("load", "an update to version 1"),
        ("resume", "an update to version 1"),
        ("score", "to score the canaries of version 1"),
        ("pause", "cut 4 of version 0"),
        ("partial", "cut 4 of version 0"),
        ("resume", "to resume after a cut"),
    ],
)
async def test_a_refused_step_ends_the_worker_with_a_message_and_drops_nothing(
    place: Place, step: str, what: str
) -> None:
    offer(place.bus, 0)
    announce(place.bus, 0)
    engine = Refuses(place.dialogue)
    async with working(place, engine=engine) as running:
        engine.shut()
        await running.until(lambda: engine.live == 2)
        if "cut" not in what:
            engine.step = step
            announce(place.bus, 1)
        elif step != "resume":
            engine.step = step
            request_cut(place, 4)
        else:
            request_cut(place, 4)
            await running.until(lambda: running.worker.status()["cut"] == 4)
            engine.step = step
            place.bus.publish(CONTROL, [Outgoing(RUN, encode(CutReleased(RUN, 4, 1)))])
        with pytest.raises(UserError) as error:
            await running.ends()
    assert error.value.code is ExitCode.ENGINE
    assert str(error.value).startswith(f"the inference engine refused {what}\nits error: {ERROR}\nwhat to try: ")
    assert (committed(place.bus), messages(place.bus, TRAJECTORIES)) == (0, [])
    if "cut" in what:
        announce(place.bus, 1)
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 1)
    assert finished(place.bus) == ids(0)


def test_the_text_of_a_refused_step_is_the_documented_one() -> None:
    with pytest.raises(UserError) as error, required("an update to version 12"):
        raise EngineFailed("weight update: ValueError: model.norm.weight: 4096 bytes are missing")
    assert str(error.value) == documented("A step that a living engine refuses")


def test_other_errors_are_passed_on() -> None:
    with pytest.raises(KeyError), required("an update to version 12"):
        raise KeyError("a mistake of ours")
