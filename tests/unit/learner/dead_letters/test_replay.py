"""Dead letters: listing them, and replaying each exactly once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.bus.decoding import MOST_COPIED_BYTES, OMITTED, dead_letter
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Position, Record
from palimpsest.common.config import load
from palimpsest.common.messages import CONTROL, DEAD_LETTERS, REPLAYED, TASKS, TRAJECTORIES, decode, encode
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.dead_letters.command import run_command
from palimpsest.services.learner.dead_letters.replay import Buried, chosen, read, replay
from tests.learner_parts.ingest import an_ingest
from tests.records.builders import a_finished

ROOT = Path(__file__).parents[4]
RUN = """\
run.id = "test"
run.folder = "{folder}"
model.path = "m"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 3
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


@pytest.fixture
def bus(toml: Path) -> Iterator[Bus]:
    bus = open_bus(load([str(toml)], {}, program="").config)
    yield bus
    bus.close()


def write_letter(
    bus: Bus, topic: str, record: Outgoing, cause: RejectCause, reason: str = "why", *, run: str = "test"
) -> Position:
    """Publish a record on its topic and the dead letter that a reader writes for it."""
    (at,) = bus.publish(topic, [record])
    read_replay(bus, topic, record, at, cause, reason, run=run)
    return at


def read_replay(
    bus: Bus, topic: str, record: Outgoing, at: Position, cause: RejectCause, reason: str = "why", *, run: str = "test"
) -> None:
    read = Record(topic, at.partition, at.offset, record.key, record.body, record.headers)
    letter = dead_letter(run, read, RejectedRecord(cause, reason), now=1_700_000_000.0)
    bus.publish(DEAD_LETTERS, [Outgoing(record.key, encode(letter))])


def test_a_long_record_is_sent_again_from_the_log(bus: Bus) -> None:
    write_letter(bus, TRAJECTORIES, Outgoing("k", b"short"), RejectCause.UNDECODABLE)
    write_letter(bus, TRAJECTORIES, Outgoing("k", b"a" * (MOST_COPIED_BYTES + 1)), RejectCause.UNDECODABLE)
    buried, _ = read(bus, "test")
    assert len(buried[1].letter.body) == 0
    assert len(list(replay(bus, buried, again=False))) == 2
    sent = [record for record in read_existing(bus, TRAJECTORIES) if REPLAYED in record.headers]
    assert [record.body for record in sent] == [b"short", b"a" * (MOST_COPIED_BYTES + 1)]
    assert all(OMITTED not in record.headers for record in sent)


def output_of(*arguments: str | Path) -> list[str]:
    """Return the command's output."""
    return list(run_command([str(argument) for argument in arguments], {}))


GARBAGE = Outgoing("g000007", b"\x00garbage", {"trajectory": "g000007/3", "own": "header"})


def test_a_replayed_record_equals_the_original_and_names_its_letter(bus: Bus, toml: Path) -> None:
    write_letter(bus, TASKS, Outgoing("x", b"?"), RejectCause.UNDECODABLE)
    at = write_letter(bus, TRAJECTORIES, GARBAGE, RejectCause.UNDECODABLE)
    lines = output_of("replay", toml, "--offset=1")
    (first, second) = read_existing(bus, TRAJECTORIES)
    assert (second.key, second.body, second.partition) == ("g000007", b"\x00garbage", at.partition)
    assert second.headers == {"trajectory": "g000007/3", "own": "header", "replayed": "0/1"}
    assert first.headers == GARBAGE.headers
    assert lines == [
        f"dead letter 1 (undecodable): 8 bytes, key g000007, sent to trajectories[{at.partition}]@{second.offset}",
        "sent 1 record",
    ]
    assert len(list(read_existing(bus, TASKS))) == 1, "nothing else was sent"


def test_a_record_is_replayed_twice_only_on_request(bus: Bus, toml: Path) -> None:
    write_letter(bus, TRAJECTORIES, GARBAGE, RejectCause.UNDECODABLE)
    write_letter(bus, CONTROL, Outgoing("test", b"?"), RejectCause.UNKNOWN_SCHEMA)
    assert output_of("replay", toml)[-1] == "sent 2 records"
    hint = "2 records sent before; --again sends them again"
    assert output_of("replay", toml) == [f"nothing to send: {hint}"]
    write_letter(bus, TRAJECTORIES, Outgoing("g000008", b"??"), RejectCause.NOT_FINITE)
    assert output_of("replay", toml)[-1] == f"sent 1 record; skipped {hint}"
    assert len(list(read_existing(bus, TRAJECTORIES))) == 4
    assert output_of("replay", toml, "--again", "--cause=unknown_schema")[-1] == "sent 1 record"
    assert [record.headers.get("replayed") for record in read_existing(bus, CONTROL)] == [None, "0/1", "0/1"]


def test_several_letters_of_one_record_are_replayed_once(bus: Bus, toml: Path) -> None:
    """Each reader of a topic writes its own letter, and a restarted reader writes another."""
    at = write_letter(bus, CONTROL, Outgoing("test", b"?"), RejectCause.UNDECODABLE)
    read_replay(bus, CONTROL, Outgoing("test", b"?"), at, RejectCause.UNDECODABLE)
    (one,), unreadable = read(bus, "test")
    assert (one.at, one.again, one.replayed, unreadable) == (Position(0, 0), (Position(0, 1),), (), [])
    assert output_of("replay", toml, "--offset=1")[-1] == "sent 1 record"
    read_replay(bus, CONTROL, Outgoing("test", b"?"), at, RejectCause.UNDECODABLE)  # written after the replay
    assert output_of("replay", toml)[0].startswith("nothing to send")
    ((one,), _) = read(bus, "test")
    assert one.replayed == (Position(0, 1),)


def test_a_letter_that_names_no_topic_of_a_run_is_listed_as_unreadable(bus: Bus) -> None:
    read_replay(bus, "elsewhere", Outgoing("k", b"?"), Position(0, 0), RejectCause.UNDECODABLE)
    buried, (unreadable,) = read(bus, "test")
    assert (buried, unreadable.at) == ([], Position(0, 0))
    assert "'elsewhere'" in unreadable.reason


def test_headers_that_a_reader_added_are_not_replayed(bus: Bus, toml: Path) -> None:
    headers = {"claim": "c3" * 32, "claim_lost": "no such body"}
    write_letter(bus, TRAJECTORIES, Outgoing("g000001", b"", headers), RejectCause.MISSING_CLAIM)
    output_of("replay", toml)
    (_, sent) = read_existing(bus, TRAJECTORIES)
    assert sent.headers == {"claim": "c3" * 32, "replayed": "0/0"}


def test_the_list_is_a_table_with_counts_by_cause(bus: Bus, toml: Path) -> None:
    at = write_letter(bus, TRAJECTORIES, GARBAGE, RejectCause.UNDECODABLE, "trajectories: no\nrecord")
    write_letter(bus, TRAJECTORIES, Outgoing("g000007", b"x" * 1234), RejectCause.NOT_FINITE, "segment 0: not finite")
    write_letter(bus, TRAJECTORIES, Outgoing("g000007", b"y"), RejectCause.NOT_FINITE, "segment 1: not finite")
    write_letter(bus, TASKS, Outgoing("elsewhere", b"z"), RejectCause.NOT_FINITE, run="another")
    bus.publish(DEAD_LETTERS, [Outgoing("", b"no letter")])
    output_of("replay", toml, "--offset=0")
    where = f"trajectories[{at.partition}]"
    assert output_of("list", toml)[:-1] == [
        "offset  when (UTC)           record             key      bytes  sent  cause        reason",
        f"     0  2023-11-14 22:13:20  {where}@0  g000007      8  yes   undecodable  trajectories: no\\nrecord",
        f"     1  2023-11-14 22:13:20  {where}@1  g000007   1234        not_finite   segment 0: not finite",
        f"     2  2023-11-14 22:13:20  {where}@2  g000007      1        not_finite   segment 1: not finite",
        "",
        "3 records: 2 not_finite, 1 undecodable",
    ]
    assert output_of("list", toml)[-1].startswith("1 record on dead_letters cannot be read")
    assert [line.split()[0] for line in output_of("list", toml, "--cause=not_finite")[1:3]] == ["1", "2"]
    assert output_of("list", toml, "--cause=missing_claim")[0] == "no dead letters"
    assert output_of("replay", toml, "--cause=missing_claim") == ["nothing to send: no dead letter matches"]


def test_the_json_list_has_the_same_content(bus: Bus, toml: Path) -> None:
    at = write_letter(bus, TRAJECTORIES, GARBAGE, RejectCause.UNDECODABLE)
    bus.publish(DEAD_LETTERS, [Outgoing("", b"no letter")])
    (line,) = output_of("list", toml, "--json")
    listed = json.loads(line)
    assert listed["causes"] == {"undecodable": 1}
    assert [one["offset"] for one in listed["unreadable"]] == [1]
    assert listed["records"] == [
        {
            "offset": 0, "letters": [0], "buried_at": 1_700_000_000.0, "topic": TRAJECTORIES,
            "position": {"partition": at.partition, "offset": at.offset}, "key": "g000007",
            "headers": {"trajectory": "g000007/3", "own": "header"}, "cause": "undecodable", "reason": "why",
            "bytes": 8, "replayed": [],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: "),
        (["lst"], "usage: "),
        (["list"], "usage: palimpsest dead-letters list RUN.toml [--cause=CAUSE ...]"),
        (["list", "--cause=not_finit"], "did you mean not_finite"),
        (["list", "--cause"], "needs a value"),
        (["replay", "--offset=seven"], "must be a whole number"),
        (["replay", "--offset=7"], "no dead letter at offset 7"),
        (["replay", "--json"], "belongs to `dead-letters list`"),
        (["list", "--again"], "belongs to `dead-letters replay`"),
        (["list", "--run.id="], "run.id is empty"),
        (["list", "--run.id=other"], "no such log"),
        (["list", "--learner.vers=3"], "did you mean learner.versions"),
    ],
)
@pytest.mark.usefixtures("bus")
def test_an_invalid_request_is_refused_with_a_message(toml: Path, arguments: list[str], says: str) -> None:
    run = [toml] if len(arguments) > 1 else []
    with pytest.raises(UserError) as error:
        output_of(*arguments[:1], *run, *arguments[1:])
    assert says in str(error.value)


def test_a_replayed_trajectory_of_an_open_group_is_trained(bus: Bus, toml: Path) -> None:
    """End to end: an unusable record, replayed once it is usable, replaces its dead letter."""
    ingest = an_ingest(bus, groups=1, max_staleness=0)
    ledger, reader = ingest.ledger, ingest.reader
    ingest.start({}, {}, {}, now=0.0)
    ingest.tasks.offer(Version(0), now=0.0)
    early = a_finished(0, 1, segments=(a_finished(0, 1).segments[0],))
    bus.publish(TRAJECTORIES, [Outgoing(early.group, encode(early), {"trajectory": early.trajectory})])
    reader.read_all(Version(-1), timeout_s=0)  # as if version 0 had not been published
    assert ledger.counts()["dead_lettered"] == 1
    assert output_of("replay", toml, "--cause=unknown_version")[-1] == "sent 1 record"
    reader.read_all(Version(0), timeout_s=0)
    assert ledger.counts()["dead_lettered"] == 0
    assert list(reader.arrived) == ["g000000/1"]
    ingest.close()


def test_letters_are_selected_by_letter_and_by_cause() -> None:
    letter = decode(
        DEAD_LETTERS,
        encode(
            dead_letter("test", Record(TASKS, 0, 5, "k", b"", {}), RejectedRecord(RejectCause.WRONG_RUN, "?"), now=0.0)
        ),
    )
    one = Buried(letter, Position(0, 3), again=(Position(0, 9),))
    assert chosen([one], offsets=[9], causes=[]) == [one]
    assert chosen([one], offsets=[9], causes=[RejectCause.UNDECODABLE]) == []
    assert chosen([one], offsets=[4], causes=[]) == []
    assert chosen([one], offsets=[], causes=[RejectCause.WRONG_RUN]) == [one]
    assert list(replay(None, [], again=True)) == []  # type: ignore[arg-type]  # nothing chosen: no bus is touched


@pytest.mark.thorough
@pytest.mark.usefixtures("bus")
def test_the_program_runs_without_torch(toml: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['learner', 'dead-letters', 'list', {str(toml)!r}]\n"
        "try:\n    runpy.run_module('palimpsest.services.learner', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout) == (0, "no dead letters\n"), done.stderr
