"""Two processes of one name: the second is refused; a restarted one takes its name at once."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.held_name import LOOK_S, WAIT_S, HeldName, _machine, _start_time, has_ended
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store import routes_members
from palimpsest.services.snapshot_store.kept_members import KeptMembers
from palimpsest.services.snapshot_store.members import LEASE_S, Members, NameTaken
from palimpsest.services.snapshot_store.storage import Unavailable
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
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


def test_a_restarted_store_knows_the_holders(tmp_path: Path) -> None:
    """Without its file, a second process could take the name before the holder renews it."""
    with FolderStore(tmp_path, sweep_s=3600) as served, SnapshotClient(served.url) as client:
        client.take_name("rollout", "worker-0", FOREIGN)
        client.take_name("rollout", "worker-1", FOREIGN)
        client.free_name("rollout", "worker-1", FOREIGN["instance"])
    twin = {"instance": "a-third-machine 7 99 bb", "holder": "host 3, process 7"}
    with FolderStore(tmp_path, sweep_s=3600) as served, SnapshotClient(served.url) as client:
        assert client.take_name("rollout", "worker-0", twin)["holder"] == FOREIGN["holder"]
        assert client.take_name("rollout", "worker-0", FOREIGN) == {"lease_s": LEASE_S}
        assert client.take_name("rollout", "worker-1", twin) == {"lease_s": LEASE_S}


async def test_a_kept_name_is_free_a_lease_after_the_start_of_the_store(tmp_path: Path) -> None:
    now, storage = [0.0], DiskStorage(tmp_path)
    before = KeptMembers(storage, clock=lambda: now[0])
    await before.take("rollout/worker-0", "a", "host 1")
    now[0] = 1000.0
    after = KeptMembers(storage, clock=lambda: now[0])
    await after.open()
    now[0] += LEASE_S - 1
    with pytest.raises(NameTaken, match="rollout/worker-0 is held by host 1"):
        await after.take("rollout/worker-0", "b", "host 2")
    now[0] += 1
    await after.take("rollout/worker-0", "b", "host 2")


async def test_a_name_that_could_not_be_stored_is_stored_by_the_next_request(tmp_path: Path) -> None:
    class Failing(DiskStorage):
        fails = True

        async def put(self, *arguments: Any, **flags: Any) -> Any:
            if self.fails:
                raise Unavailable("no answer")
            return await super().put(*arguments, **flags)

    storage = Failing(tmp_path)
    members = KeptMembers(storage)
    with pytest.raises(Unavailable):
        await members.take("rollout/worker-0", "a", "host 1")
    storage.fails = False
    await members.take("rollout/worker-0", "a", "host 1")
    again = KeptMembers(storage)
    await again.open()
    with pytest.raises(NameTaken):
        await again.take("rollout/worker-0", "b", "host 2")


async def test_a_damaged_file_of_names_is_named(tmp_path: Path) -> None:
    (tmp_path / "members.json").write_bytes(b'{"rollout/worker-0": 3}')
    with pytest.raises(Damaged, match=r"members\.json: "):
        await KeptMembers(DiskStorage(tmp_path)).open()


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
