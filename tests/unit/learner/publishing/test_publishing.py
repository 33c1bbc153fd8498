"""Versions and checkpoints that are written in a thread."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.versions import Version
from palimpsest.services.learner.publishing.background import Background
from palimpsest.services.learner.publishing.publishing import Checkpoint, Publishing
from palimpsest.services.learner.timing import PhaseTimer
from tests.processes.waiting import LIMIT_S


class Scribe:
    """Replaces the publisher and the checkpoints: notes what is written, in which thread."""

    def __init__(self, *, fails: bool = False) -> None:
        self.notes: list[str] = []
        self.saved: list[dict[str, torch.Tensor]] = []
        self.inline = True
        self.go = threading.Event()
        self._fails, self._here = fails, threading.get_ident()

    def prepare(self) -> str:
        return "prepared"

    def publish(self, version: Version, *, now: float, prepared: str) -> Any:
        assert (prepared, now) == ("prepared", 3.0)
        self._note(f"version {version}")
        if self._fails:
            raise Fenced("another learner took over this run")
        return SimpleNamespace(version=version, digest=f"digest of {version}", object_size=int(version), full_size=100)

    def save(self, progress: Any, tensors: Any) -> bool:
        self.saved.append(tensors)
        self._note(f"checkpoint {progress}")
        return True

    def oldest_version(self) -> Version:
        return Version(6)

    def keep_from(self, lowest: Version) -> None:
        self._note(f"keep from {lowest}")

    def _note(self, what: str) -> None:
        self.inline = threading.get_ident() == self._here
        if not self.inline:
            assert self.go.wait(LIMIT_S)
        self.notes.append(what)


def publishing(scribe: Any, *, background: bool, checkpoints_inline: bool = False) -> Publishing:
    def announced(version: Version, digest: str) -> None:
        scribe.notes.append(f"announced {version}")

    return Publishing(
        scribe, scribe, PhaseTimer(), background=background, announced=announced,
        needed=lambda kept: Version(kept - 2), checkpoints_inline=checkpoints_inline,
    )  # fmt: skip


STATE: Any = Checkpoint("of 7", {})  # type: ignore[arg-type]
WRITTEN = ["checkpoint of 7", "version 7", "keep from 4", "announced 7"]


def test_inline_everything_is_written_at_once() -> None:
    scribe = Scribe()
    ours = publishing(scribe, background=False)
    ours.publish(Version(7), STATE, now=3.0)
    assert (scribe.notes, scribe.inline, ours.pending, ours.digest) == (WRITTEN, True, False, "digest of 7")


def test_in_the_background_the_same_is_written_in_the_same_order_while_the_loop_goes_on() -> None:
    scribe = Scribe()
    ours = publishing(scribe, background=True)
    ours.publish(Version(7), STATE, now=3.0)
    assert (scribe.notes, ours.pending, ours.look(), ours.permits("offers"), ours.digest) == (
        [],
        True,
        False,
        False,
        "",
    )
    scribe.go.set()
    assert ours.wait()
    assert (scribe.notes, scribe.inline, ours.pending, ours.digest) == (WRITTEN, False, False, "digest of 7")
    assert ours.permits("offers")
    ours.publish(Version(8), None, now=3.0)
    ours.finish()
    assert scribe.notes[len(WRITTEN) :] == ["version 8", "keep from 4", "announced 8"]
    assert ours.stored.take() == {"versions": 2, "bytes": 15, "full_bytes": 200}
    assert ours.stored.take() == {"versions": 0, "bytes": 0, "full_bytes": 0}


def test_a_failure_in_the_thread_is_raised_in_the_loop_but_not_while_it_waits_to_step() -> None:
    scribe = Scribe(fails=True)
    ours = publishing(scribe, background=True)
    ours.publish(Version(7), STATE, now=3.0)
    scribe.go.set()
    assert not ours.wait()
    assert not ours.wait()
    with pytest.raises(Fenced):
        ours.finish()
    assert scribe.notes == ["checkpoint of 7", "version 7"]


def test_a_checkpoint_that_versions_do_not_wait_for_holds_the_state_of_its_version() -> None:
    scribe, state = Scribe(), torch.zeros(3)
    ours = publishing(scribe, background=True)
    ours.publish(Version(7), Checkpoint(STATE.progress, {"w": state}), now=3.0, durable=False)
    state += 1.0  # a step
    scribe.go.set()
    ours.finish()
    ours.save(Checkpoint(STATE.progress, {"w": state}))  # waits for the one in writing
    assert [each["w"].tolist() for each in scribe.saved] == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("durable", [True, False])
def test_the_loop_writes_a_checkpoint_of_all_ranks_before_the_thread_begins(durable: bool) -> None:
    scribe = Scribe()
    ours = publishing(scribe, background=True, checkpoints_inline=True)
    ours.publish(Version(7), STATE, now=3.0, durable=durable)
    assert (scribe.notes, ours.pending) == (["checkpoint of 7"], True)  # a thread may write nothing yet
    scribe.go.set()
    ours.finish()
    assert (scribe.notes, scribe.inline) == (WRITTEN, False)


def test_a_checkpoint_that_fails_in_its_thread_ends_the_learner() -> None:
    scribe = Scribe(fails=True)
    ours = publishing(scribe, background=True)
    ours._saves.begin(lambda: bool(1 / 0))
    ours._saves.wait()
    with pytest.raises(ZeroDivisionError):
        ours.look()


def test_the_wait_is_a_phase_of_its_own() -> None:
    scribe, seconds = Scribe(), iter(range(100))
    ours = publishing(scribe, background=True)
    ours._phases = phases = PhaseTimer(clock=lambda: float(next(seconds)))
    ours.publish(Version(7), None, now=3.0)
    scribe.go.set()
    ours.wait()
    assert phases.take() == {"other": 3.0, "publish": 1.0, "publish_wait": 1.0}


def test_a_second_piece_of_work_waits_until_the_first_is_collected(tmp_path: Path) -> None:
    work: Background[int] = Background("a test")
    assert (work.busy, work.done, work.wait()) == (False, False, True)
    work.begin(lambda: 5)
    with pytest.raises(AssertionError):
        work.begin(lambda: 6)
    assert work.wait()
    assert work.collect() == 5
    assert not work.busy
