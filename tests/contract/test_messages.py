"""Records on the log: the bytes of every release decode, and other bytes are refused.

The files in golden/ hold bytes that a release wrote, and never change. A change of meaning needs a new schema number, a
new file, and a decoder that still reads the old one.
"""

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common import messages
from palimpsest.common.bus.decoding import dead_letter
from palimpsest.common.bus.port import Record
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TOPICS,
    TRAJECTORIES,
    WORKERS,
    ControlChanged,
    CutReached,
    CutReleased,
    CutRequested,
    DeadLetter,
    DropReason,
    Ending,
    EvaluationEnded,
    EvaluationStarted,
    GroupOffered,
    OldLogprobsComputed,
    OldLogprobsRequested,
    RunFinished,
    Sampling,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    Undecodable,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    decode,
    encode,
)
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version

GOLDEN = Path(__file__).parent / "golden"
DIGEST = "c3" * 32
TOKENS = bytes.fromhex("01000000 02000000 ff7f0000 04000000")  # 1, 2, 32767, 4
HALVES = bytes.fromhex("000000bf 000080bf")  # float32 -0.5, -1.0
OFFERED = GroupOffered(
    run="first",
    group="g000007",
    index=7,
    version=Version(3),
    environment="lookup",
    task_seed=1234567890123,
    samples=8,
    sampling=Sampling(temperature=0.75, max_turn_tokens=8, max_trajectory_tokens=96, max_turns=4),
    time_limit_s=600.0,
)
FINISHED = TrajectoryFinished(
    run="first",
    trajectory="g000007/3",
    group="g000007",
    attempt=1,
    worker="worker-0",
    environment="lookup",
    environment_version="1",
    tokens=TOKENS,
    segments=(Segment(1, 3, Version(2), HALVES), Segment(3, 4, Version(3), HALVES[:4])),
    temperature=0.75,
    reward=0.25,
    reward_parts={"call": 0.25, "answer": 0.0},
    success=False,
    ending=Ending.TRUNCATED,
    turns=2,
)
DROPPED = TrajectoryDropped(
    run="first",
    trajectory="g000007/4",
    group="g000007",
    worker="worker-0",
    reason=DropReason.ENVIRONMENT_FAILED,
    detail="busy: 429 too many sessions – später",
)
PUBLISHED = VersionPublished(run="first", version=Version(300), digest=DIGEST, published_at=1700000000.5)
ENDED = RunFinished(run="first", version=Version(200))
ALIVE = WorkerAlive(run="first", worker="worker-0", version=-1, live=3, sampled_tokens=123456, seconds=12.5, idle_s=0.0)
APPLIED = VersionApplied(
    run="first", worker="worker-0", version=Version(4), digest=DIGEST, accepted=True, canary_error=0.0013,
    pause_s=0.05, live=12,
)  # fmt: skip
FLUSHED = SegmentFlushed(
    run="first", trajectory="g000007/3", group="g000007", attempt=1, worker="worker-0", cut=12, tokens=TOKENS,
    segments=(Segment(1, 3, Version(2), HALVES),), temperature=0.75,
)  # fmt: skip
CUT_REQUESTED = CutRequested(run="first", cut=12, version=Version(3), deadline_s=5.0)
CHANGED = ControlChanged(
    run="first", writer=3, number=2, change="c-2", who="ann", role="tune", address="10.0.0.1", what="settings",
    before={"learner.optimizer.lr": 1e-6}, after={"learner.optimizer.lr": 2e-6}, generation=1, version=Version(9),
    next_group=40, asked_at=1700000000.5, applies_from="next version",
)  # fmt: skip
EVALUATION_STARTED = EvaluationStarted(run="first", version=Version(300), writer=7)
EVALUATION_ENDED = EvaluationEnded(run="first", version=Version(300), writer=7)
CUT_RELEASED = CutReleased(run="first", cut=12)
CUT_REACHED = CutReached(
    run="first", worker="worker-0", cut=12, version=-1, positions={0: 17, 3: 300}, flushed=2, pause_s=0.25,
)  # fmt: skip
ASKED = OldLogprobsRequested(
    run="first", trajectory="g000007/3", tokens=TOKENS, segments=(Segment(1, 3, Version(2), HALVES),), temperature=0.75,
)  # fmt: skip
SCORED = OldLogprobsComputed(
    run="first", trajectory="g000007/3", by="replica-0", version=Version(2), digest=DIGEST, start=1, stop=3,
    prefix="5a" * 32, values=HALVES,
)  # fmt: skip
LETTER = DeadLetter(
    run="first", topic="trajectories", partition=2, offset=99, key="g000007", headers={"trajectory": "g000007/3"},
    body=b"\x00\xff", cause=RejectCause.UNDECODABLE, reason="not msgpack", buried_at=1700000000.5,
)  # fmt: skip
WITH_ROUTES = msgspec.structs.replace(
    FINISHED, segments=tuple(msgspec.structs.replace(one, routes=bytes((3, 250))) for one in FINISHED.segments)
)
OF_WRITER = {"writer": 7}
WRITTEN: dict[str, tuple[str, msgspec.Struct]] = {
    "group_offered-1": (TASKS, OFFERED),
    "group_offered-1.writer": (TASKS, msgspec.structs.replace(OFFERED, **OF_WRITER)),
    "group_offered-1.evaluation": (TASKS, msgspec.structs.replace(OFFERED, group="e000003-000007", evaluation=True)),
    "evaluation_started-1": (CONTROL, EVALUATION_STARTED),
    "evaluation_ended-1": (CONTROL, EVALUATION_ENDED),
    "trajectory_finished-1": (TRAJECTORIES, FINISHED),
    "trajectory_finished-1.routes": (TRAJECTORIES, WITH_ROUTES),
    "trajectory_dropped-1": (TRAJECTORIES, DROPPED),
    "segment_flushed-1": (TRAJECTORIES, FLUSHED),
    "cut_requested-1": (CONTROL, CUT_REQUESTED),
    "cut_released-1": (CONTROL, CUT_RELEASED),
    "control_changed-1": (CONTROL, CHANGED),
    "version_published-1": (CONTROL, PUBLISHED),
    "run_finished-1": (CONTROL, ENDED),
    "cut_requested-1.writer": (CONTROL, msgspec.structs.replace(CUT_REQUESTED, **OF_WRITER)),
    "cut_released-1.writer": (CONTROL, msgspec.structs.replace(CUT_RELEASED, **OF_WRITER)),
    "version_published-1.writer": (CONTROL, msgspec.structs.replace(PUBLISHED, **OF_WRITER)),
    "run_finished-1.writer": (CONTROL, msgspec.structs.replace(ENDED, **OF_WRITER)),
    "run_finished-1.versions": (CONTROL, msgspec.structs.replace(ENDED, versions=200, **OF_WRITER)),
    "worker_alive-1": (WORKERS, ALIVE),
    "version_applied-1": (WORKERS, APPLIED),
    "cut_reached-1": (WORKERS, CUT_REACHED),
    "old_logprobs_requested-1": (OLD_LOGPROBS, ASKED),
    "old_logprobs_computed-1": (OLD_LOGPROBS, SCORED),
    "dead_letter-2": (DEAD_LETTERS, LETTER),
}
"""Golden file -> topic and record. Earlier releases wrote records of `control` and offers without their writer."""


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def fields(record: msgspec.Struct) -> dict[str, Any]:
    """The encoded map, decoded without the type."""
    decoded: dict[str, Any] = msgspec.msgpack.decode(encode(record))
    return decoded


@pytest.mark.parametrize("name", WRITTEN)
def test_the_bytes_of_every_release_decode(name: str) -> None:
    topic, record = WRITTEN[name]
    assert decode(topic, golden(name)) == record


@pytest.mark.parametrize("name", WRITTEN)
def test_this_release_writes_the_same_bytes(name: str) -> None:
    """If this fails, check that readers of both releases accept the new bytes."""
    _, record = WRITTEN[name]
    assert encode(record) == golden(name)


def test_every_golden_file_is_checked() -> None:
    assert {path.stem for path in GOLDEN.glob("*.bin")} == set(WRITTEN)


def test_every_kind_of_record_has_a_golden_file() -> None:
    kinds = {
        kind.__struct_config__.tag
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag
    }
    assert kinds == {name.partition(".")[0].replace("-", "/") for name in WRITTEN}


def test_every_topic_has_a_golden_file() -> None:
    assert {topic for topic, _ in WRITTEN.values()} == set(TOPICS)


def test_the_smallest_record_byte_by_byte() -> None:
    """msgpack by hand: a map of 3, texts with their lengths, 200 as uint8."""
    pieces = [b"\x83", b"\xa4type", b"\xaerun_finished/1", b"\xa3run", b"\xa5first", b"\xa7version", b"\xcc\xc8"]
    assert encode(ENDED) == b"".join(pieces)


def test_a_record_is_a_map_by_field_name_with_its_tag() -> None:
    assert fields(PUBLISHED) == {
        "type": "version_published/1", "run": "first", "version": 300, "digest": DIGEST, "published_at": 1700000000.5,
    }  # fmt: skip


def test_a_trajectory_carries_packed_tokens_and_its_segments_by_name() -> None:
    found = fields(FINISHED)
    assert found["tokens"] == TOKENS
    assert found["segments"] == [
        {"start": 1, "stop": 3, "version": 2, "behavior_logprobs": HALVES},
        {"start": 3, "stop": 4, "version": 3, "behavior_logprobs": HALVES[:4]},
    ]
    assert (found["type"], found["ending"], found["reward_parts"]) == (
        "trajectory_finished/1", "truncated", {"call": 0.25, "answer": 0.0},
    )  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_an_unknown_field_is_refused_by_name(name: str) -> None:
    topic, record = WRITTEN[name]
    with pytest.raises(Undecodable, match=f"^{topic}: .*surprise"):
        decode(topic, msgspec.msgpack.encode({**fields(record), "surprise": 1}))


@pytest.mark.parametrize("name", WRITTEN)
def test_every_missing_field_is_refused_by_name(name: str) -> None:
    topic, record = WRITTEN[name]
    for missing in fields(record).keys() - {"type", "writer", "versions", "evaluation"}:
        with pytest.raises(Undecodable, match=f"^{topic}: .*{missing}"):
            decode(topic, msgspec.msgpack.encode({k: v for k, v in fields(record).items() if k != missing}))


@pytest.mark.parametrize("tag", ["version_published/2", "version_published", "VersionPublished", "", 1, None])
def test_an_unknown_tag_is_refused(tag: object) -> None:
    for topic, record in WRITTEN.values():
        with pytest.raises(Undecodable, match=topic) as error:
            decode(topic, msgspec.msgpack.encode({**fields(record), "type": tag}))
        assert error.value.cause is (RejectCause.UNKNOWN_SCHEMA if isinstance(tag, str) else RejectCause.UNDECODABLE)


@pytest.mark.parametrize("topic", [TRAJECTORIES, CONTROL, WORKERS, OLD_LOGPROBS])
def test_a_record_without_a_tag_is_refused_on_topics_with_several_kinds(topic: str) -> None:
    for other, record in WRITTEN.values():
        if other == topic:
            with pytest.raises(Undecodable):
                decode(topic, msgspec.msgpack.encode({k: v for k, v in fields(record).items() if k != "type"}))


def test_a_record_of_another_topic_is_refused() -> None:
    for topic, record in WRITTEN.values():
        for other in set(TOPICS) - {topic}:
            with pytest.raises(Undecodable) as error:
                decode(other, encode(record))
            assert error.value.cause is RejectCause.UNKNOWN_SCHEMA


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "3"),
        ("version", 3.5),
        ("version", True),
        ("version", None),
        ("samples", 8.5),
        ("group", 7),
        ("group", b"g"),
        ("time_limit_s", "600"),
        ("sampling", {"temperature": 1.0}),
        ("sampling", [0.75, 8, 96, 4]),
        ("sampling", {"temperature": 0.75, "max_turn_tokens": 8, "max_trajectory_tokens": 96, "max_turns": 4, "x": 1}),
    ],
)
def test_a_field_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(Undecodable, match=f"^{TASKS}: "):
        decode(TASKS, msgspec.msgpack.encode({**fields(OFFERED), field: value}))


def test_an_unknown_ending_is_refused() -> None:
    with pytest.raises(Undecodable, match="ending"):
        decode(TRAJECTORIES, msgspec.msgpack.encode({**fields(FINISHED), "ending": "exhausted"}))


@pytest.mark.parametrize("name", WRITTEN)
def test_truncated_bytes_are_refused(name: str) -> None:
    topic, _ = WRITTEN[name]
    body = golden(name)
    for length in range(len(body)):
        with pytest.raises(Undecodable):
            decode(topic, body[:length])


@pytest.mark.parametrize("name", WRITTEN)
def test_trailing_bytes_are_refused(name: str) -> None:
    topic, _ = WRITTEN[name]
    with pytest.raises(Undecodable):
        decode(topic, golden(name) + b"\0")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TOPICS), st.binary(max_size=60))
def test_garbage_raises_undecodable(topic: str, body: bytes) -> None:
    with pytest.raises(Undecodable) as error:
        decode(topic, body)
    assert error.value.cause is RejectCause.UNDECODABLE


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(Undecodable):
        decode(CONTROL, encode(ENDED).replace(b"first", b"\xff\xfe\xfd\xfc\xfb"))


def test_deeply_nested_garbage_is_refused() -> None:
    with pytest.raises(Undecodable):
        decode(TRAJECTORIES, msgspec.msgpack.encode(fields(FINISHED))[:-1] + b"\x91" * 100_000)


def test_a_dead_letter_holds_the_complete_record() -> None:
    record = Record("tasks", 3, 17, "g000007", b"\x00\xff", {"trajectory": "x"})
    assert dead_letter("first", record, RejectedRecord(RejectCause.NOT_FINITE, "why"), now=5.5) == DeadLetter(
        run="first", topic="tasks", partition=3, offset=17, key="g000007", headers={"trajectory": "x"},
        body=b"\x00\xff", cause=RejectCause.NOT_FINITE, reason="why", buried_at=5.5,
    )  # fmt: skip


def test_the_kinds_of_a_topic_have_different_tags() -> None:
    for union in (messages.Trajectory, messages.Control, messages.FromWorker, messages.OldLogprobs):
        tags = [kind.__struct_config__.tag for kind in get_args(union)]
        assert len(set(tags)) == len(tags) > 1
