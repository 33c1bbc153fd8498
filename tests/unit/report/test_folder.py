"""Reading run folders: truncated, resumed, and moved."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    TASKS,
    TRAJECTORIES,
    WORKERS,
    DeadLetter,
    DropReason,
    GroupOffered,
    SegmentFlushed,
    TrajectoryDropped,
    WorkerAlive,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.checkpointing.manifest import folder_name
from palimpsest.services.report.folder import Seconds, contents, history, newest_checkpoint, read_seconds
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.summary import summarize
from tests.records.builders import SAMPLING, a_finished
from tests.records.history_lines import a_full_line, a_line

RUN = 'run.id = "test"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def write_history(folder: Path, versions: int, *, torn: bytes = b"") -> list[bytes]:
    lines = [msgspec.json.encode(a_line(version)) + b"\n" for version in range(versions)]
    (folder / "history.jsonl").write_bytes(b"".join(lines) + torn)
    return lines


def write_checkpoint(folder: Path, version: int, history_bytes: int) -> Path:
    ledger = {
        "next_index": 1, "open_groups": {}, "trained": 2 * version, "dropped": {}, "dead_lettered": 0, "offered": 40,
    }  # fmt: skip
    manifest = folder / "checkpoints" / folder_name(Version(version), 1) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    body = {"schema": 1, "ledger": ledger, "history_bytes": history_bytes, "seconds": 12.0, "version": version}
    manifest.write_bytes(msgspec.json.encode(body))
    return manifest


def test_an_incomplete_last_line_is_ignored(folder: Path):
    write_history(folder, 2, torn=b'{"version": 2, "pha')
    assert [line["version"] for line in contents(folder).lines] == [0, 1]


def test_a_damaged_line_before_the_last_is_refused(folder: Path):
    path = folder / "history.jsonl"
    path.write_bytes(msgspec.json.encode(a_line(0)) + b'\n{"vers\n{"version": 2}\n')
    with pytest.raises(UserError, match=r"history\.jsonl, line 2"):
        list(history(path))


def without(line: Line, *keys: str) -> Line:
    """The line without the key at this path."""
    first, *inner = keys
    if not inner:
        return {key: value for key, value in line.items() if key != first}
    return line | {first: without(line[first], *inner)}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (without(a_full_line(0), "reward"), "reward"),
        (without(a_full_line(0), "by_staleness", "0", "entropy"), "entropy"),
        (without(a_full_line(0), "ratios", "discrepancy", "0", "bins"), "bins"),
        (without(a_full_line(0), "versions", "oldest", "1"), r"versions\.oldest"),
        (a_full_line(0) | {"tokens": "many"}, r"\$\.tokens"),
        (a_full_line(0) | {"batch": 0}, r"\$\.batch"),
        (a_full_line(0) | {"by_staleness": {"x": {}}}, "by_staleness"),
        ([], "Expected `object`"),
    ],
)
def test_a_line_that_lacks_a_key_or_has_another_type_is_named(folder: Path, line: Any, named: str):
    lines = [a_full_line(0), line]
    (folder / "history.jsonl").write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in lines))
    with pytest.raises(UserError, match=rf"history\.jsonl, line 2: .*{named}.* Restore") as error:
        contents(folder)
    assert error.value.code is ExitCode.DAMAGED


def test_a_line_of_an_older_release_needs_no_newer_key(folder: Path):
    write_history(folder, 1)
    summary = summarize(contents(folder))
    assert (summary["removal"], summary["leak"], summary["stored"]) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{}", "version"),
        (b'{"version": 1, "evaluation": {}, "trajectories": {"offered": 4}, "best": null}', "scored"),
        (b'{"version": 1, "evaluation": [], "trajectories": {"offered": 4, "scored": 4}, "best": null}', "evaluation"),
        (b"[]", "object"),
        (b"\xff", "line 1"),
    ],
)
def test_a_damaged_evaluation_is_named(folder: Path, line: bytes, named: str):
    (folder / "evaluations.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=rf"evaluations\.jsonl, line 1.*{named}|evaluations\.jsonl, {named}"):
        contents(folder)


def test_lines_after_the_newest_checkpoint_do_not_count(folder: Path):
    lines = write_history(folder, 3)
    write_checkpoint(folder, 2, len(lines[0]) + len(lines[1]))
    held = contents(folder)
    assert [line["version"] for line in held.lines] == [0, 1]
    assert held.checkpoint is not None
    assert held.checkpoint.ledger.trained == 4


def test_an_unreadable_checkpoint_is_skipped(folder: Path):
    write_checkpoint(folder, 1, 10)
    write_checkpoint(folder, 2, 20).write_bytes(b"{")
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.history_bytes == 10


def test_a_run_that_did_not_start_is_empty(folder: Path):
    held = contents(folder)
    assert (held.lines, held.checkpoint, held.seconds) == ((), None, None)
    assert not (folder / "bus.sqlite").exists(), "reading creates no log"


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not the folder of a run"):
        contents(tmp_path)


def test_only_records_of_the_run_are_counted(folder: Path):
    bus = SqliteBus(folder / "bus.sqlite")
    bus.create_topics({TASKS: 8, TRAJECTORIES: 4, "control": 1, WORKERS: 1, "old_logprobs": 1, "dead_letters": 1})
    finished, foreign = a_finished(0, 0), a_finished(0, 1, run="other")
    dropped = TrajectoryDropped("test", "g000000/1", "g000000", "worker-0", DropReason.DEADLINE, "")
    records = [finished, finished, dropped, foreign]
    bus.publish(TRAJECTORIES, [*(Outgoing("g000000", encode(r)) for r in records), Outgoing("g000000", b"?")])
    alive = WorkerAlive("test", "worker-0", version=1, live=2, sampled_tokens=3, seconds=4.0, idle_s=0.5)
    bus.publish(WORKERS, [Outgoing("worker-0", encode(alive))])
    offer = GroupOffered("test", "g000000", 0, Version(0), "lookup", 1, samples=8, sampling=SAMPLING, time_limit_s=9.0)
    bus.publish(TASKS, [Outgoing("g000000", encode(offer))])
    letters = [
        DeadLetter("test", topic, 0, 4, "", {}, b"?", RejectCause.UNDECODABLE, "why", 0.0)
        for topic in (TRAJECTORIES, "control", "control")
    ]
    bus.publish("dead_letters", [Outgoing("", encode(letter)) for letter in letters])
    bus.close()
    log = contents(folder).log
    assert (log.records, log.duplicates, log.offered) == (3, 1, 8)
    assert log.dead_letters == {"control": 1, TRAJECTORIES: 1}, "letters of two workers about one record count once"
    assert (log.tokens, log.trainable_tokens) == (16, 8)
    assert log.bytes == 2 * len(encode(finished)) + len(encode(dropped))
    assert log.alive == (alive,)


def test_flushes_at_a_cut_are_not_duplicates(folder: Path):
    bus = SqliteBus(folder / "bus.sqlite")
    bus.create_topics({TASKS: 8, TRAJECTORIES: 4, "control": 1, WORKERS: 1, "old_logprobs": 1, "dead_letters": 1})
    ends = [a_finished(0, 0), a_finished(0, 1)]
    flushes = [
        SegmentFlushed("test", end.trajectory, end.group, 0, "worker-0", cut, end.tokens, end.segments, 1.0)
        for end in ends
        for cut in (1, 2)
    ]
    bus.publish(TRAJECTORIES, [Outgoing("g000000", encode(record)) for record in (*flushes, *ends)])
    bus.close()
    log = contents(folder).log
    assert (log.records, log.duplicates, log.tokens) == (2, 0, 16)
    assert log.bytes == sum(len(encode(record)) for record in (*flushes, *ends))


def test_a_moved_folder_is_readable(folder: Path):
    moved = folder.parent / "elsewhere"
    write_history(folder, 1)
    folder.rename(moved)
    assert len(contents(moved).lines) == 1


def test_seconds_without_a_file_are_unknown(folder: Path):
    assert read_seconds(folder / "seconds.json") is None
    (folder / "seconds.json").write_text('{"setup": 30.5, "run": 4}')
    assert read_seconds(folder / "seconds.json") == Seconds(30.5, 4.0)
