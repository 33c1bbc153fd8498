"""A checkpoint is valid only if it is complete and committed in the store."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest
import torch

from palimpsest.common import failpoints
from palimpsest.common.snapshots.adapter import Adapter
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
    """The checkpointing part of a learner that took the run over."""

    def __init__(self, store: SnapshotClient, folder: Path, *, keep: int = 2, adapter: Adapter | None = None) -> None:
        self.writer = Writer(store, "a test")
        self.writer.begin()
        self.checkpoints = Checkpoints(folder, self.writer, keep=keep, adapter=adapter)
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


def test_the_newest_checkpoint_is_the_saved_one(learner: Learner) -> None:
    learner.save(4)
    got, state = learner.checkpoints.newest()
    assert (got.version, got.ledger, got.offsets, got.task_offsets) == (4, LEDGER, {0: 5, 1: 7}, {0: 3})
    assert got.score_offsets == {0: 6, 1: 2}
    assert torch.equal(state["0.master"], tensors(4)["0.master"])


def test_a_checkpoint_of_another_base_model_is_not_continued(store: SnapshotClient, folder: Path) -> None:
    one, other = (Adapter(base * 64, 4, 8.0, ("q_proj",)) for base in "ab")
    learner = Learner(store, folder, adapter=one)
    learner.save(4)
    assert learner.checkpoints.newest()[0].adapter == one
    assert Learner(store, folder, adapter=one).found == 4
    with pytest.raises(UserError, match=r"checkpoint 00000004-00000002 of this run belongs to another base model"):
        Learner(store, folder, adapter=other)
    with pytest.raises(UserError, match="holds an adapter of rank 4"):
        Learner(store, folder)


def test_a_checkpoint_without_score_offsets_is_readable(learner: Learner, folder: Path) -> None:
    """The score reader then starts at the beginning of the log."""
    learner.save(4)
    manifest = folder / "00000004-00000002" / "manifest.json"
    fields = msgspec.json.decode(manifest.read_bytes())
    del fields["score_offsets"]
    manifest.write_bytes(msgspec.json.encode(fields))
    assert msgspec.json.decode(manifest.read_bytes(), type=Progress).score_offsets == {}


def test_only_the_newest_checkpoints_are_kept_on_disk_and_in_the_store(learner: Learner, folder: Path) -> None:
    assert learner.checkpoints.oldest_version() is None
    learner.save(1, 2, 3, 4, 5)
    assert names(folder) == ["00000004-00000002", "00000005-00000002"]
    assert learner.committed() == [(4, 2), (5, 2)]
    assert learner.checkpoints.oldest_version() == 4
    assert learner.checkpoints.newest()[0].version == 5


def test_newest_raises_without_a_checkpoint(learner: Learner) -> None:
    with pytest.raises(NoCheckpoint):
        learner.checkpoints.newest()


def test_a_complete_checkpoint_is_never_overwritten(learner: Learner, folder: Path) -> None:
    learner.save(3)
    written = (folder / "00000003-00000002" / "manifest.json").stat().st_mtime_ns
    learner.checkpoints.save(progress(3, 2), tensors(4))
    assert (folder / "00000003-00000002" / "manifest.json").stat().st_mtime_ns == written
    assert torch.equal(learner.checkpoints.newest()[1]["0.master"], tensors(3)["0.master"])


def test_a_successor_resumes_from_a_checkpoint_and_writes_into_its_own_folders(
    learner: Learner, store: SnapshotClient, folder: Path
) -> None:
    learner.save(3)
    successor = Learner(store, folder)
    assert successor.found == 3
    successor.save(3)
    assert names(folder) == ["00000003-00000002", "00000003-00000003"]
    written = [msgspec.json.decode((path / MANIFEST).read_bytes(), type=Progress) for path in complete(folder)]
    assert [one.writer for one in written] == [2, 3]


def test_a_replaced_learner_commits_and_removes_nothing_and_names_its_successor(
    learner: Learner, store: SnapshotClient, folder: Path
) -> None:
    learner.save(1, 2)
    successor = Learner(store, folder)
    with pytest.raises(Fenced) as fenced:
        learner.save(3)
    assert fenced.value.code is ExitCode.REPLACED
    assert "another learner took over this run: writer 2 (a test) was replaced by writer 3 (a test)" in str(
        fenced.value
    )
    assert successor.committed() == [(1, 2), (2, 2)]
    assert [folder.name for folder in complete(folder)] == ["00000001-00000002", "00000002-00000002"]
    assert Learner(store, folder).found == 2


def test_without_fencing_a_restart_would_use_the_replaced_learners_checkpoint(
    learner: Learner, store: SnapshotClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    successor = Learner(store, folder)
    successor.save(1)
    monkeypatch.setenv(failpoints.VARIABLE, "store.skip_fencing")
    learner.save(2)
    assert Learner(store, folder).found == 2


def test_the_next_checkpoint_removes_uncommitted_folders(learner: Learner, store: SnapshotClient, folder: Path) -> None:
    learner.save(1)
    successor = Learner(store, folder)
    with pytest.raises(Fenced):
        learner.save(2)
    (folder / "mine").mkdir()
    assert names(folder) == ["00000001-00000002", "00000002-00000002", "mine"]
    successor.save(2)
    assert names(folder) == ["00000001-00000002", "00000002-00000003", "mine"]


def test_a_replaced_learner_raises_fenced_after_its_successor_removed_its_files(
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
def test_a_checkpoint_interrupted_by_a_kill_is_valid_once_committed_in_the_store(
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
    """A writer whose process ends just before or just after it withdraws the oldest commit."""

    def __init__(self, store: SnapshotClient, *, withdrawn: bool) -> None:
        super().__init__(store)
        self._withdrawn = withdrawn

    def withdraw(self, commit: object) -> None:
        if self._withdrawn:
            super().withdraw(commit)  # type: ignore[arg-type]
        raise SystemExit


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_kill_during_a_removal_keeps_the_newest_checkpoint(
    store: SnapshotClient, folder: Path, withdrawn: bool
) -> None:
    writer = DiesWhileRemoving(store, withdrawn=withdrawn)
    writer.begin()
    dying = Checkpoints(folder, writer, keep=1)
    dying.save(progress(1, 2), tensors(1))
    with pytest.raises(SystemExit):
        dying.save(progress(2, 2), tensors(2))
    restarted = Learner(store, folder, keep=1)
    assert restarted.found == 2
    restarted.save(3)
    assert names(folder) == ["00000003-00000003"]


DAMAGES = {
    "state byte flipped": ("state.safetensors", lambda body: body[:-1] + bytes([body[-1] ^ 1])),
    "state truncated": ("state.safetensors", lambda body: body[:-4]),
    "manifest truncated": ("manifest.json", lambda body: body[:-9]),
    "manifest changed": ("manifest.json", lambda body: body.replace(b'"seconds":1.5', b'"seconds":2.5')),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "folder removed"])
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(learner: Learner, folder: Path, damage: str) -> None:
    learner.save(1, 2)
    if damage == "folder removed":
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


def test_a_checkpoint_of_another_schema_is_skipped(learner: Learner) -> None:
    learner.save(1)
    learner.checkpoints.save(msgspec.structs.replace(progress(2, 2), schema=99), tensors(2))
    assert learner.checkpoints.newest()[0].version == 1


def test_a_run_without_a_readable_checkpoint_does_not_restart_from_zero(learner: Learner, folder: Path) -> None:
    learner.save(1, 2)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="none of this run's 2 checkpoints can be read") as error:
        learner.checkpoints.newest()
    assert error.value.code is ExitCode.DAMAGED


@pytest.mark.parametrize("lost", [(1, 2), (2,)])
def test_a_store_that_lost_the_newest_commit_is_refused(
    learner: Learner, store: SnapshotClient, folder: Path, tmp_path: Path, lost: tuple[int, ...]
) -> None:
    learner.save(1, 2)
    for version in lost:
        (tmp_path / "store" / "checkpoints" / f"{version:08d}-00000002.json").unlink()
    with pytest.raises(
        UserError, match="holds checkpoint 00000002-00000002, but the snapshot store has no commit"
    ) as error:
        Learner(store, folder)
    assert error.value.code is ExitCode.DAMAGED


def test_a_checkpoint_of_an_earlier_release_is_refused(learner: Learner, folder: Path) -> None:
    learner.save(1)
    shutil.copytree(folder / "00000001-00000002", folder / "00000009")
    with pytest.raises(UserError, match="holds checkpoint 00000009, but"):
        learner.checkpoints.newest()
