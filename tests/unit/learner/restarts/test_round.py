"""What launchers tell each other in a round."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.restarts.deaths import LearnerEnding, RankDeath
from palimpsest.services.learner.restarts.round import BEAT_S, LOST_S, Round


class Store:
    """The part of torch's store that a round uses."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class Clock:
    """Time that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def two(store: Any, clock: Clock) -> tuple[Round, Round]:
    return Round(store, node=0, nodes=2, now=clock), Round(store, node=1, nodes=2, now=clock)


def check_messages(store: Any) -> None:
    first, second = two(store, Clock())
    assert first.death() is None
    assert first.ending() is None
    death = RankDeath(-9, "rank 1 (on b) was ended by SIGKILL")
    assert second.tell_death(death) == death
    assert first.tell_death(RankDeath(1, "rank 0 (on a) ended with exit code 1")) == death, "the first one counts"
    assert first.death() == death
    first.tell_ending(ending := LearnerEnding(137, "all restarts are used up"))
    assert second.ending() == ending
    first.tell_read()
    first.tell_read()
    assert not second.all_read(), "a launcher counts once"
    second.tell_read()
    assert first.all_read()
    first.finish()
    assert not first.all_finished()
    second.finish()
    assert first.all_finished()
    assert first.leaving() == 0
    second.leave(1)
    assert first.leaving() == 1


def test_all_launchers_read_what_one_tells() -> None:
    check_messages(Store())


@pytest.mark.parametrize(
    ("died", "fewest", "ends"), [(True, 2, True), (True, 1, False), (False, 2, False), (False, 1, False)]
)
def test_a_launcher_that_leaves_ends_a_run_that_waits_for_it(*, died: bool, fewest: int, ends: bool) -> None:
    first, second = two(Store(), Clock())
    if died:
        first.tell_death(RankDeath(-9, "rank 0 (on a) was ended by SIGKILL"))
    assert second.leave(fewest) == ends
    ending = first.ending()
    assert (ending is not None) == ends
    if ending is not None:
        assert ending.code == ExitCode.INTERRUPTED
        assert ending.text.startswith("rank 0 (on a) was ended by SIGKILL; 1 of 2 nodes received a signal to end")
    first.tell_read()
    assert first.all_read(), "no launcher waits for the one that leaves"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_all_launchers_read_what_one_tells_in_a_store_of_torch(kind: str, tmp_path: Path) -> None:
    import torch.distributed as dist

    store: Any = (
        dist.FileStore(str(tmp_path / "store"))
        if kind == "file"
        else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))
    )
    check_messages(dist.PrefixStore("round 1", store))


def test_a_node_is_lost_when_it_gives_no_sign_of_life() -> None:
    clock = Clock()
    first, second = two(Store(), clock)
    while clock.now <= LOST_S:
        assert first.lost() is None
        assert second.lost() is None
        clock.now += BEAT_S
    silent = clock.now
    while clock.now <= silent + LOST_S:
        assert first.lost() is None
        clock.now += BEAT_S
    assert first.lost() == 1
