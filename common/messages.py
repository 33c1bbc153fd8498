"""Every record on the log, and its bytes.

A record is a msgspec struct in msgpack, a map keyed by field name with a tag `name/schema`: a reader refuses
unknown fields and unknown tags instead of guessing. A change of meaning takes a new schema number; golden bytes in
tests/contract/golden keep old ones readable. docs/messages.md lists the fields.
"""

from enum import StrEnum
from typing import Any, get_args

import msgspec
from msgspec import Struct

from palimpsest.common.cut_messages import (
    CutReached as CutReached,
    CutReleased as CutReleased,
    CutRequested as CutRequested,
    OldLogprobsComputed as OldLogprobsComputed,
    OldLogprobsRequested as OldLogprobsRequested,
    SegmentFlushed as SegmentFlushed,
)
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version

TASKS = "tasks"
TRAJECTORIES = "trajectories"
CONTROL = "control"
WORKERS = "workers"
OLD_LOGPROBS = "old_logprobs"
DEAD_LETTERS = "dead_letters"
REPLAYED = "replayed"
"""Header of a dead letter that was sent to its topic again: where the letter stands, `partition/offset`."""
TOPICS = (TASKS, TRAJECTORIES, CONTROL, WORKERS, OLD_LOGPROBS, DEAD_LETTERS)


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are sampled. top_p is 1 and top_k off for training: there are no fields for them."""

    temperature: float
    max_turn_tokens: int
    """Longest model message."""
    max_trajectory_tokens: int
    """Longest trajectory, prompt and tool output included."""
    max_turns: int
    """Most model messages."""


class Ending(StrEnum):
    """How a trajectory ended."""

    TERMINATED = "terminated"
    """The environment said so."""
    TRUNCATED = "truncated"
    """A limit on turns or tokens was reached; the environment scored what there was."""


class DropReason(StrEnum):
    """Why a trajectory was discarded."""

    ENVIRONMENT_FAILED = "environment_failed"
    """Every attempt at the session failed: reward unknown, so never 0."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The first observation leaves no room for an answer."""
    ENGINE_FAILED = "engine_failed"
    """The engine refused or lost a request in every attempt. (One that dies drops nothing.)"""
    OVER_STALENESS = "over_staleness"
    """Older than max_staleness when it could have been trained on (the backstop behind admission)."""
    DEADLINE = "deadline"
    """Nothing heard of it within the group's time limit."""
    GROUP_TOO_SMALL = "group_too_small"
    """Too few of its group came back for a baseline."""


class GroupOffered(Struct, frozen=True, forbid_unknown_fields=True, tag="group_offered/1"):
    """A task and how many trajectories to sample for it. Topic `tasks`, key = group."""

    run: str
    group: str
    index: int
    """Place in the run's order of offers; the task follows from it and the run's seed."""
    version: Version
    """Newest when it was offered. No token of it may be sampled by an older one: the staleness bound rests on that."""
    environment: str
    task_seed: int
    samples: int
    """Trajectories wanted; they share a baseline."""
    sampling: Sampling
    time_limit_s: float
    """The learner gives up on what is not back by then."""


class TrajectoryFinished(Struct, frozen=True, forbid_unknown_fields=True, tag="trajectory_finished/1"):
    """A whole trajectory. Topic `trajectories`, key = group."""

    run: str
    trajectory: str
    """`group/sample`, stable across attempts: the unit of the ledger."""
    group: str
    attempt: int
    """Sessions that failed before this one."""
    worker: str
    environment: str
    environment_version: str
    """As the environment names itself: a change means other tasks or rewards."""
    tokens: bytes
    """int32: prompt, model and tool tokens in order."""
    segments: tuple[Segment, ...]
    temperature: float
    reward: float
    """In [0, 1]. A trajectory whose reward is not known is dropped, never given 0."""
    reward_parts: dict[str, float]
    """What the reward is made of."""
    success: bool
    """Whether the task was solved, apart from the reward."""
    ending: Ending
    turns: int
    """Model messages."""


class TrajectoryDropped(Struct, frozen=True, forbid_unknown_fields=True, tag="trajectory_dropped/1"):
    """A trajectory that a worker had to give up. Topic `trajectories`, key = group."""

    run: str
    trajectory: str
    group: str
    worker: str
    reason: DropReason
    detail: str


class VersionPublished(Struct, frozen=True, forbid_unknown_fields=True, tag="version_published/1"):
    """A version stands complete in the store. Topic `control`."""

    run: str
    version: Version
    digest: str
    published_at: float
    """Unix seconds, for displays only."""


class RunFinished(Struct, frozen=True, forbid_unknown_fields=True, tag="run_finished/1"):
    """The learner trained its last version; workers drain and stop. Topic `control`."""

    run: str
    version: Version


class WorkerAlive(Struct, frozen=True, forbid_unknown_fields=True, tag="worker_alive/1"):
    """How a worker fares, every few seconds. Topic `workers`, key = worker."""

    run: str
    worker: str
    version: int
    """Verified on its engine; -1 before the first."""
    live: int
    sampled_tokens: int
    """Since the process began."""
    seconds: float
    """Since it could first sample."""
    idle_s: float
    """Of these, without any trajectory in flight."""


class VersionApplied(Struct, frozen=True, forbid_unknown_fields=True, tag="version_applied/1"):
    """A worker's engine holds a version, or refused it. Topic `workers`, key = worker."""

    run: str
    worker: str
    version: Version
    digest: str
    accepted: bool
    canary_error: float
    """Mean |engine - learner| over the canary's tokens, nats."""
    pause_s: float
    """How long generation stood still."""
    live: int
    """Trajectories in flight during the update."""


class DeadLetter(Struct, frozen=True, forbid_unknown_fields=True, tag="dead_letter/2"):
    """A record that could not be used, whole. Topic `dead_letters`, key = the original's."""

    run: str
    """Of the reader that buried it."""
    topic: str
    partition: int
    offset: int
    key: str
    headers: dict[str, str]
    body: bytes
    cause: RejectCause
    reason: str
    """What was wrong, for a person."""
    buried_at: float
    """Unix seconds, for displays only."""


Trajectory = TrajectoryFinished | TrajectoryDropped | SegmentFlushed
Control = VersionPublished | CutRequested | CutReleased | RunFinished
FromWorker = WorkerAlive | VersionApplied | CutReached
OldLogprobs = OldLogprobsRequested | OldLogprobsComputed


class Undecodable(RejectedRecord):
    """Bytes on the log that are not a record of this topic; the message says why."""


class _Tagged(Struct):
    """Of any record, its tag."""

    type: str


_KINDS: dict[str, Any] = {
    TASKS: GroupOffered,
    TRAJECTORIES: Trajectory,
    CONTROL: Control,
    WORKERS: FromWorker,
    OLD_LOGPROBS: OldLogprobs,
    DEAD_LETTERS: DeadLetter,
}
_DECODERS = {topic: msgspec.msgpack.Decoder(kinds) for topic, kinds in _KINDS.items()}
_TAGS = {topic: {kind.__struct_config__.tag for kind in get_args(kinds) or (kinds,)} for topic, kinds in _KINDS.items()}
_encoder = msgspec.msgpack.Encoder()
_tags = msgspec.msgpack.Decoder(_Tagged)


def encode(record: Struct) -> bytes:
    """The record's bytes on the log."""
    return _encoder.encode(record)


def decode(topic: str, body: bytes) -> Any:
    """The record of `topic` in these bytes; raises Undecodable."""
    try:
        return _DECODERS[topic].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        tag = _tag(body)
        if tag is not None and tag not in _TAGS[topic]:
            raise Undecodable(
                RejectCause.UNKNOWN_SCHEMA,
                f"{topic}: {tag!r} is not known here, only {', '.join(sorted(_TAGS[topic]))}",
            ) from error
        raise Undecodable(RejectCause.UNDECODABLE, f"{topic}: {error}") from error


def _tag(body: bytes) -> str | None:
    """What kind of record the bytes say they are; None where they say nothing."""
    try:
        return _tags.decode(body).type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the fields passed over may be nested garbage
        return None


def trajectory_id(group: str, sample: int) -> str:
    """Id of a group's sample.

    >>> trajectory_id("g000007", 3)
    'g000007/3'
    """
    return f"{group}/{sample}"


def group_id(index: int) -> str:
    """Id of the run's index-th group.

    >>> group_id(7)
    'g000007'
    """
    return f"g{index:06d}"
