"""Two processes of one name: the second is refused; a restarted one takes its name at once."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.held_name import LOOK_S, WAIT_S, HeldName, _machine, _start_time, has_ended
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store import routes_members
from palimpsest.services.snapshot_store.members import LEASE_S, Members, NameTaken
from tests.processes.waiting import LIMIT_S, until
from tests.servers.stores import FolderStore

FOREIGN = {"instance": "another-machine 7 99 aa", "holder": "host 2, process 7"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotClient]:
    with FolderStore(tmp_path, sweep_s=3600) as served, SnapshotClient(served.url) as client:
        yield client


class Pauses:
    """Pauses that take no time but count; `then` runs in each."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self, seconds: float) -> bool:
        self.passed += seconds
        return False


def held(store: SnapshotClient, pause: Pauses, lost: list[UserError] | None = None) -> HeldName:
    return HeldName(
        store,
        "rollout",
        "worker-0",
        key="rollout.worker",
        on_lost=(lost if lost is not None else []).append,
        pause=pause,
        clock=lambda: pause.passed,
    )


def test_a_second_process_of_a_name_is_refused(store: SnapshotClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_members, "LEASE_S", 0.03)  # renewals come fast; the store holds the name as long as ever
    renewed = Pauses()

    def a_renewal(_seconds: float) -> bool:
        seen = store.take_name("rollout", "worker-0", FOREIGN)["renewals"]
        until(lambda: store.take_name("rollout", "worker-0", FOREIGN)["renewals"] > seen)
        return False

    with held(store, renewed):
        twin = HeldName(store, "rollout", "worker-0", key="rollout.worker", on_lost=print, pause=a_renewal)
        with pytest.raises(
            UserError, match=r"already has a rollout process named worker-0: .*--rollout.worker=NAME"
        ) as e:
            twin.__enter__()
        assert e.value.code == ExitCode.CONFIGURATION
    with held(store, Pauses()) as after:  # the first one freed it
        assert after


def test_a_name_whose_holder_is_silent_is_refused_only_after_its_lease(store: SnapshotClient) -> None:
    assert WAIT_S > LEASE_S
    store.take_name("rollout", "worker-0", FOREIGN)
    pauses = Pauses()
    with pytest.raises(UserError, match="host 2, process 7"):
        held(store, pauses).__enter__()
    assert pauses.passed == WAIT_S


def test_a_restarted_process_takes_the_name_of_its_dead_predecessor_at_once(store: SnapshotClient) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    instance = f"{_machine()} {process.pid} {_start_time(process.pid)} aa"
    assert not has_ended(instance)
    store.take_name("rollout", "worker-0", {"instance": instance, "holder": "its predecessor"})
    process.kill()
    until(lambda: has_ended(instance))  # also while it is a zombie
    pauses = Pauses()
    with held(store, pauses):
        assert pauses.passed < LOOK_S
    process.wait()


def test_a_process_that_lost_its_name_gets_an_error(store: SnapshotClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_members, "LEASE_S", 0.03)
    lost, reported = list[UserError](), threading.Event()

    def on_lost(error: UserError) -> None:
        lost.append(error)
        reported.set()

    with HeldName(store, "replica", "replica-0", key="replica.name", on_lost=on_lost, pause=Pauses()):
        first = store.take_name("replica", "replica-0", FOREIGN)["instance"]
        store.take_name("replica", "replica-0", {**FOREIGN, "replaces": first})
        assert reported.wait(LIMIT_S)
    assert lost[0].code == ExitCode.REPLACED
    assert "host 2, process 7" in str(lost[0])
    assert store.take_name("replica", "replica-0", FOREIGN) == {"lease_s": 0.03}  # the loser has not freed it


def test_a_name_is_free_after_its_lease() -> None:
    now = [0.0]
    members = Members(clock=lambda: now[0])
    members.take("rollout/worker-0", "a", "host 1")
    now[0] = LEASE_S - 1
    members.take("rollout/worker-0", "a", "host 1")
    now[0] = 2 * LEASE_S - 2
    with pytest.raises(NameTaken, match="rollout/worker-0 is held by host 1"):
        members.take("rollout/worker-0", "b", "host 2")
    members.take("replica/worker-0", "b", "host 2")  # another role
    now[0] += 1
    members.take("rollout/worker-0", "b", "host 2")
