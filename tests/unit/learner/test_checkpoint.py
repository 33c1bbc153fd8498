"""A checkpoint is whole or not there."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from common import faults
from common.versions import Version
from services.learner.checkpoint import Checkpoints, NoCheckpoint
from services.learner.history import History
from services.learner.planner import LedgerState
from services.learner.progress import SCHEMA, Progress

LEDGER = LedgerState(
    next_index=9,
    open_groups={"g000008": {2: "deadline"}},
    trained=5,
    dropped={"deadline": 1},
    dead_lettered=0,
    offered=9,
)


def progress(version: int) -> Progress:
    return Progress(
        schema=SCHEMA,
        run="test",
        writer=0,
        version=Version(version),
        digest="d",
        trained_versions=version,
        optimizer_steps=version,
        ledger=LEDGER,
        offsets={0: 5, 1: 7},
        task_offsets={0: 3},
        history_bytes=11,
        seconds=1.5,
    )


def tensors(version: int) -> dict[str, torch.Tensor]:
    return {"0.master": torch.full((3, 2), float(version)), "0.exp_avg": torch.zeros(3, 2)}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(progress(4), tensors(4))
    got, state = checkpoints.newest()
    assert (got.version, got.ledger, got.offsets, got.task_offsets) == (4, LEDGER, {0: 5, 1: 7}, {0: 3})
    assert torch.equal(state["0.master"], tensors(4)["0.master"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.oldest_version() is None
    for version in range(1, 6):
        checkpoints.save(progress(version), tensors(version))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["00000004-00000000", "00000005-00000000"]
    assert checkpoints.oldest_version() == 4
    assert checkpoints.newest()[0].version == 5


def test_without_any_there_is_nothing_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint):
        Checkpoints(tmp_path / "none", keep=2).newest()


def test_one_that_stands_is_never_taken_apart_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(progress(3), tensors(3))
    written = (tmp_path / "00000003-00000000" / "manifest.json").stat().st_mtime_ns
    checkpoints.save(progress(3), tensors(4))
    assert (tmp_path / "00000003-00000000" / "manifest.json").stat().st_mtime_ns == written
    assert torch.equal(checkpoints.newest()[1]["0.master"], tensors(3)["0.master"])


def _save_and_die(folder: Path) -> None:
    os.environ[faults.VARIABLE] = "learner.inside_checkpoint"
    Checkpoints(folder, keep=2).save(progress(2), tensors(2))


def test_one_that_was_being_written_at_a_kill_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(progress(1), tensors(1))
    process = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "00000002-00000000").exists()
    assert checkpoints.newest()[0].version == 1
    checkpoints.save(progress(2), tensors(2))  # the same version again, now whole
    assert checkpoints.newest()[0].version == 2


@pytest.mark.parametrize("damage", ["flip a byte of the state", "cut the state", "cut the manifest", "other schema"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for version in (1, 2):
        checkpoints.save(progress(version), tensors(version))
    state, manifest = (
        tmp_path / "00000002-00000000" / "state.safetensors",
        tmp_path / "00000002-00000000" / "manifest.json",
    )
    match damage:
        case "flip a byte of the state":
            body = bytearray(state.read_bytes())
            body[-1] ^= 1
            state.write_bytes(body)
        case "cut the state":
            state.write_bytes(state.read_bytes()[:-4])
        case "cut the manifest":
            manifest.write_bytes(manifest.read_bytes()[:-9])
        case "other schema":
            manifest.write_text(manifest.read_text().replace(f'"schema":{SCHEMA}', '"schema":99'))
    got, state_ = checkpoints.newest()
    assert got.version == 1
    assert torch.equal(state_["0.master"], tensors(1)["0.master"])


def test_history_is_cut_back_to_what_the_checkpoint_counts(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl", length=0)
    history.add({"version": 0})
    counted = history.length
    history.add({"version": 1})
    history.close()
    again = History(tmp_path / "history.jsonl", length=counted)
    again.add({"version": 1, "again": True})
    again.close()
    assert (tmp_path / "history.jsonl").read_text() == '{"version":0}\n{"version":1,"again":true}\n'
