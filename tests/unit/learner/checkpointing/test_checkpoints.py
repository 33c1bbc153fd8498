"""A checkpoint counts whole or not at all, and only if the store took it."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest
import torch

from palimpsest.common import failpoints
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints, NoCheckpoint
from palimpsest.services.learner.checkpointing.manifest import (
    MANIFEST,
    SCHEMA,
    Progress,
    complete,
    version_and_writer,
)

pytestmark = pytest.mark.thorough

LEDGER = LedgerState(
    next_index=9,
    open_groups={"g000008": {2: "deadline"}},
    trained=5,
    dropped={"deadline": 1},
    dead_lettered=0,
    offered=9,
)
DIED = ["learner.inside_checkpoint", "learner.before_committing", "learner.after_committing"]


def progress(version: int, writer: int) -> Progress:
    return Progress(
        schema=SCHEMA,
        run="test",
        writer=writer,
        version=Version(version),
        digest="d",
        trained_versions=version,
        optimizer_steps=version,
        ledger=LEDGER,
        offsets={0: 5, 1: 7},
        task_offsets={0: 3},
        history_bytes=11,
        seconds=1.5,
        score_offsets={0: 6, 1: 2},
    )


def tensors(version: int) -> dict[str, torch.Tensor]:
    return {"0.master": torch.full((3, 2), float(version)), "0.exp_avg": torch.zeros(3, 2)}


class Learner:
    """The part of a learner that checkpoints; it has taken the run over."""

    def __init__(self, store: SnapshotClient, folder: Path, *, keep: int = 2) -> None:
        self.writer = Writer(store, "a test")
        self.writer.begin()
        self.checkpoints = Checkpoints(folder, self.writer, keep=keep)
        try:
            self.found: int | None = self.checkpoints.newest()[0].version
        except NoCheckpoint:
            self.found = None

    def save(self, *versions: int) -> None:
        for version in versions:
            self.checkpoints.save(progress(version, self.writer.epoch), tensors(version))

    def committed(self) -> list[tuple[int, int]]:
        return [(commit.version, commit.writer) for commit in self.writer.committed()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def learner(store: SnapshotClient, folder: Path) -> Learner:
    return Learner(store, folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(learner: Learner) -> None:
    learner.save(4)
    got, state = learner.checkpoints.newest()
    assert (got.version, got.ledger, got.offsets, got.task_offsets) == (4, LEDGER, {0: 5, 1: 7}, {0: 3})
    assert got.score_offsets == {0: 6, 1: 2}
    assert torch.equal(state["0.master"], tensors(4)["0.master"])


def test_one_that_does_not_say_where_scores_are_wanted_from_is_gone_on_from_too(learner: Learner, folder: Path) -> None:
    """Scores are read from the beginning then."""
    learner.save(4)
    manifest = folder / "00000004-00000002" / "manifest.json"
    said = msgspec.json.decode(manifest.read_bytes())
    del said["score_offsets"]
    manifest.write_bytes(msgspec.json.encode(said))
    assert msgspec.json.decode(manifest.read_bytes(), type=Progress).score_offsets == {}


def test_only_the_newest_are_kept_here_and_in_the_store(learner: Learner, folder: Path) -> None:
    assert learner.checkpoints.oldest_version() is None
    learner.save(1, 2, 3, 4, 5)
    assert names(folder) == ["00000004-00000002", "00000005-00000002"]
    assert learner.committed() == [(4, 2), (5, 2)]
    assert learner.checkpoints.oldest_version() == 4
    assert learner.checkpoints.newest()[0].version == 5


def test_without_any_there_is_nothing_to_start_from(learner: Learner) -> None:
    with pytest.raises(NoCheckpoint):
        learner.checkpoints.newest()


def test_one_that_stands_is_never_taken_apart_again(learner: Learner, folder: Path) -> None:
    learner.save(3)
    written = (folder / "00000003-00000002" / "manifest.json").stat().st_mtime_ns
    learner.checkpoints.save(progress(3, 2), tensors(4))
    assert (folder / "00000003-00000002" / "manifest.json").stat().st_mtime_ns == written
    assert torch.equal(learner.checkpoints.newest()[1]["0.master"], tensors(3)["0.master"])


def test_a_successor_goes_on_from_it_and_writes_into_folders_of_its_own(
    learner: Learner, store: SnapshotClient, folder: Path
) -> None:
    learner.save(3)
    successor = Learner(store, folder)
    assert successor.found == 3
    successor.save(3)
    assert names(folder) == ["00000003-00000002", "00000003-00000003"]
    written = [msgspec.json.decode((path / MANIFEST).read_bytes(), type=Progress) for path in complete(folder)]
    assert [one.writer for one in written] == [2, 3]


def test_a_replaced_learner_commits_nothing_removes_nothing_and_says_who_replaced_it(
    learner: Learner, store: SnapshotClient, folder: Path
) -> None:
    learner.save(1, 2)
    successor = Learner(store, folder)
    with pytest.raises(Fenced) as fenced:
        learner.save(3)
    assert fenced.value.code is ExitCode.REPLACED
    assert "another learner took this run over: writer 2 (a test) was replaced by writer 3 (a test)" in str(
        fenced.value
    )
    assert successor.committed() == [(1, 2), (2, 2)]
    assert [folder.name for folder in complete(folder)] == ["00000001-00000002", "00000002-00000002"]
    assert Learner(store, folder).found == 2


def test_without_fencing_the_replaced_learners_checkpoint_would_be_gone_on_from(
    learner: Learner, store: SnapshotClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    successor = Learner(store, folder)
    successor.save(1)
    monkeypatch.setenv(failpoints.VARIABLE, "store.skip_fencing")
    learner.save(2)
    assert Learner(store, folder).found == 2


def test_what_was_never_committed_goes_with_the_next_one(learner: Learner, store: SnapshotClient, folder: Path) -> None:
    learner.save(1)
    successor = Learner(store, folder)
    with pytest.raises(Fenced):
        learner.save(2)
    (folder / "mine").mkdir()
    assert names(folder) == ["00000001-00000002", "00000002-00000002", "mine"]
    successor.save(2)
    assert names(folder) == ["00000001-00000002", "00000002-00000003", "mine"]


def test_a_replaced_learner_whose_files_its_successor_removed_hears_that_it_was_replaced(
    learner: Learner, store: SnapshotClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(place: str) -> None:
        if place == "learner.after_committing":
            monkeypatch.undo()
            Learner(store, folder, keep=1).save(2)

    monkeypatch.setattr(failpoints, "reach", replaced)
    with pytest.raises(Fenced):
        learner.save(1)
    assert names(folder) == ["00000002-00000003"]


def _save_and_die(url: str, folder: Path, fault: str) -> None:
    os.environ[failpoints.VARIABLE] = fault
    with SnapshotClient(url) as store:
        Learner(store, folder).save(2)


@pytest.mark.parametrize("fault", DIED)
def test_one_that_was_being_written_at_a_kill_counts_from_the_moment_the_store_took_it(
    learner: Learner, store: SnapshotClient, folder: Path, fault: str
) -> None:
    learner.save(1)
    process = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(store.url, folder, fault))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (folder / "00000002-00000003").exists()
    assert [path.name for path in complete(folder)] == ["00000001-00000002"]
    again = Learner(store, folder)
    assert again.found == (2 if fault == "learner.after_committing" else 1)
    again.save(3)
    assert again.committed() == [(again.found, 2 if again.found == 1 else 3), (3, 4)]
    assert [version_and_writer(path.name) for path in complete(folder)] == again.committed()


class DiesWhileRemoving(Writer):
    """The process ends just before the store hears that the oldest counts no longer, or just after."""

    def __init__(self, store: SnapshotClient, *, heard: bool) -> None:
        super().__init__(store)
        self._heard = heard

    def withdraw(self, commit: object) -> None:
        if self._heard:
            super().withdraw(commit)  # type: ignore[arg-type]
        raise SystemExit


@pytest.mark.parametrize("heard", [False, True])
def test_a_kill_during_a_removal_leaves_the_newest_in_its_place(
    store: SnapshotClient, folder: Path, heard: bool
) -> None:
    writer = DiesWhileRemoving(store, heard=heard)
    writer.begin()
    dying = Checkpoints(folder, writer, keep=1)
    dying.save(progress(1, 2), tensors(1))
    with pytest.raises(SystemExit):
        dying.save(progress(2, 2), tensors(2))
    again = Learner(store, folder, keep=1)
    assert again.found == 2
    again.save(3)
    assert names(folder) == ["00000003-00000003"]


DAMAGES = {
    "flip a byte of the state": ("state.safetensors", lambda body: body[:-1] + bytes([body[-1] ^ 1])),
    "cut the state": ("state.safetensors", lambda body: body[:-4]),
    "cut the manifest": ("manifest.json", lambda body: body[:-9]),
    "another manifest": ("manifest.json", lambda body: body.replace(b'"seconds":1.5', b'"seconds":2.5')),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "remove it"])
def test_a_damaged_one_is_passed_over_for_the_one_before(learner: Learner, folder: Path, damage: str) -> None:
    learner.save(1, 2)
    if damage == "remove it":
        shutil.rmtree(folder / "00000002-00000002")
    else:
        name, change = DAMAGES[damage]
        path = folder / "00000002-00000002" / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    got, state = learner.checkpoints.newest()
    assert got.version == 1
    assert torch.equal(state["0.master"], tensors(1)["0.master"])


def test_one_of_another_schema_is_passed_over(learner: Learner) -> None:
    learner.save(1)
    learner.checkpoints.save(msgspec.structs.replace(progress(2, 2), schema=99), tensors(2))
    assert learner.checkpoints.newest()[0].version == 1


def test_when_none_can_be_read_the_run_does_not_begin_again(learner: Learner, folder: Path) -> None:
    learner.save(1, 2)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="none of this run's 2 checkpoints can be read") as refused:
        learner.checkpoints.newest()
    assert refused.value.code is ExitCode.DAMAGED


@pytest.mark.parametrize("lost", [(1, 2), (2,)])
def test_a_store_that_has_lost_the_newest_is_refused(
    learner: Learner, store: SnapshotClient, folder: Path, tmp_path: Path, lost: tuple[int, ...]
) -> None:
    learner.save(1, 2)
    for version in lost:
        (tmp_path / "store" / "checkpoints" / f"{version:08d}-00000002.json").unlink()
    with pytest.raises(
        UserError, match="holds checkpoint 00000002-00000002, which the snapshot store does not"
    ) as refused:
        Learner(store, folder)
    assert refused.value.code is ExitCode.DAMAGED


def test_a_checkpoint_of_an_earlier_release_is_refused_and_not_begun_over(learner: Learner, folder: Path) -> None:
    learner.save(1)
    shutil.copytree(folder / "00000001-00000002", folder / "00000009")
    with pytest.raises(UserError, match="holds checkpoint 00000009, which"):
        learner.checkpoints.newest()
