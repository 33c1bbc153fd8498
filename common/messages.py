"""Messages on the log, and their encoding.

A message is a msgspec struct in msgpack: a map keyed by field name, with a tag `name/schema`. A reader rejects unknown
fields and unknown tags. A change of meaning needs a new schema number. The golden bytes in tests/contract/golden check
that old messages stay readable. docs/messages.md lists the fields.
"""

from enum import StrEnum
from typing import Any, get_args

import msgspec
from msgspec import Struct

from palimpsest.common.branches import Branch as Branch
from palimpsest.common.control_messages import (
    ControlChanged as ControlChanged,
    EvaluationEnded as EvaluationEnded,
    EvaluationStarted as EvaluationStarted,
)
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
"""Header of a replayed dead letter. Its value is the position of the dead letter, `partition/offset`."""
TOPICS = (TASKS, TRAJECTORIES, CONTROL, WORKERS, OLD_LOGPROBS, DEAD_LETTERS)


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling settings. They have no top_p and top_k, because training needs top_p = 1 and top_k off."""

    temperature: float
    max_turn_tokens: int
    """Maximum length of a model message, in tokens."""
    max_trajectory_tokens: int
    """Maximum length of a trajectory in tokens, prompt and tool output included."""
    max_turns: int
    """Maximum number of model messages."""


class Ending(StrEnum):
    """How a trajectory ended."""

    TERMINATED = "terminated"
    """The environment ended it."""
    TRUNCATED = "truncated"
    """It reached a limit on turns or tokens; the environment scored the turns up to there."""


class DropReason(StrEnum):
    """Reason for dropping a trajectory."""

    ENVIRONMENT_FAILED = "environment_failed"
    """Every attempt at the session failed. The reward is unknown, which is not a reward of 0."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The first observation leaves no room for an answer."""
    ENGINE_FAILED = "engine_failed"
    """The engine refused or lost a request in every attempt. (An engine that dies drops no trajectory.)"""
    OVER_STALENESS = "over_staleness"
    """Each of its tokens exceeded max_staleness when the learner could train on its group. Its reward still counts in
    the baseline of the group."""
    DEADLINE = "deadline"
    """It did not arrive within the time limit of its group."""
    GROUP_TOO_SMALL = "group_too_small"
    """Too few trajectories of its group arrived to compute a baseline."""
    EVEN_GROUP = "even_group"
    """All rewards of its group are equal, and learner.even_groups is "skip"."""
    VERSION_PASSED = "version_passed"
    """The worker no longer had the version that an evaluation states."""


class GroupOffered(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="group_offered/1"):
    """A task and how many trajectories to sample for it. Topic `tasks`, key = group."""

    run: str
    group: str
    index: int
    """Index in the run's sequence of offers. The index and the run's seed determine the task."""
    version: Version
    """Newest version at the time of the offer. No older version may sample a token of the group; the staleness bound
    depends on this."""
    environment: str
    task_seed: int
    samples: int
    """Number of trajectories to sample. They share a baseline."""
    sampling: Sampling
    time_limit_s: float
    """Time limit in seconds. The learner drops trajectories that arrive later."""
    writer: int = 0
    """See VersionPublished. A learner continues the offers of the learners that it replaced."""
    evaluation: bool = False
    """An evaluation: exactly `version` samples every token, and no trajectory is trained on. `index` is the number of
    the task. Releases without this field reject the offer."""


class TrajectoryFinished(
    Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="trajectory_finished/1"
):
    """A complete trajectory. Topic `trajectories`, key = group."""

    run: str
    trajectory: str
    """`group/sample`, the same for all attempts: the key of the ledger."""
    group: str
    attempt: int
    """Number of sessions that failed before this one."""
    worker: str
    environment: str
    environment_version: str
    """Version that the environment reports. A change means different tasks or rewards."""
    tokens: bytes
    """int32: prompt, model and tool tokens in order."""
    segments: tuple[Segment, ...]
    temperature: float
    reward: float
    """Reward in [0, 1]. A trajectory with an unknown reward is dropped; it does not get 0."""
    reward_parts: dict[str, float]
    """Components of the reward."""
    success: bool
    """Whether the task was solved. Independent of the reward."""
    ending: Ending
    turns: int
    """Number of model messages."""
    branches: tuple[Branch, ...] = ()
    """Further token sequences of the same session, with the same reward (common/branches.py)."""


class TrajectoryDropped(Struct, frozen=True, forbid_unknown_fields=True, tag="trajectory_dropped/1"):
    """A trajectory that a worker dropped. Topic `trajectories`, key = group."""

    run: str
    trajectory: str
    group: str
    worker: str
    reason: DropReason
    detail: str


class VersionPublished(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="version_published/1"):
    """The store holds a version completely. Topic `control`."""

    run: str
    version: Version
    digest: str
    published_at: float
    """Unix seconds, for displays only."""
    writer: int = 0
    """Epoch of the learner that wrote the record. Records of earlier releases name none: 0."""


class RunFinished(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="run_finished/1"):
    """The learner trained its last version. Workers drain and stop. Topic `control`."""

    run: str
    version: Version
    writer: int = 0
    """See VersionPublished."""
    versions: int = 0
    """Number of versions that the run trained. 0: a record of an earlier release."""


class WorkerAlive(Struct, frozen=True, forbid_unknown_fields=True, tag="worker_alive/1"):
    """State of a worker, sent every few seconds. Topic `workers`, key = worker."""

    run: str
    worker: str
    version: int
    """Verified version on its engine; -1 before the first."""
    live: int
    """Trajectories in flight."""
    sampled_tokens: int
    """Tokens sampled since the process started."""
    seconds: float
    """Seconds since the worker was first able to sample."""
    idle_s: float
    """Seconds of these without a trajectory in flight."""


class VersionApplied(Struct, frozen=True, forbid_unknown_fields=True, tag="version_applied/1"):
    """The engine of a worker holds a version, or refused it. Topic `workers`, key = worker."""

    run: str
    worker: str
    version: Version
    digest: str
    accepted: bool
    canary_error: float
    """Mean |engine - learner| over the canary tokens, in nats."""
    pause_s: float
    """Seconds for which generation paused."""
    live: int
    """Trajectories in flight during the update."""


class DeadLetter(Struct, frozen=True, forbid_unknown_fields=True, tag="dead_letter/2"):
    """A rejected record. Topic `dead_letters`, key = key of the original record."""

    run: str
    """Run of the reader that rejected the record."""
    topic: str
    partition: int
    offset: int
    key: str
    headers: dict[str, str]
    body: bytes
    """Body of the record; empty, with the header `body_omitted`, if it is longer than 1 MiB, its key longer than 1,024
    characters or its headers longer than 16,384. `topic`, `partition` and `offset` name the original."""
    cause: RejectCause
    reason: str
    """Error text for a person."""
    buried_at: float
    """Unix seconds, for displays only."""


Trajectory = TrajectoryFinished | TrajectoryDropped | SegmentFlushed
Control = (
    VersionPublished | CutRequested | CutReleased | RunFinished | ControlChanged | EvaluationStarted | EvaluationEnded
)
FromWorker = WorkerAlive | VersionApplied | CutReached
OldLogprobs = OldLogprobsRequested | OldLogprobsComputed


class Undecodable(RejectedRecord):
    """Raised for bytes on the log that are not a message of this topic. The error text says why."""


class _Tagged(Struct):
    """The tag of any message."""

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
    """Return the bytes of the message on the log."""
    return _encoder.encode(record)


def decode(topic: str, body: bytes) -> Any:
    """Return the message of `topic` in these bytes. Raises Undecodable."""
    try:
        return _DECODERS[topic].decode(body)
    except Exception as error:  # also RecursionError, of deep nesting: any error concerns this record alone
        tag = _tag(body)
        if tag is not None and tag not in _TAGS[topic]:
            raise Undecodable(
                RejectCause.UNKNOWN_SCHEMA,
                f"{topic}: unknown message type {tag!r}; this release reads {', '.join(sorted(_TAGS[topic]))}",
            ) from error
        raise Undecodable(RejectCause.UNDECODABLE, f"{topic}: {error or type(error).__name__}") from error


def _tag(body: bytes) -> str | None:
    """Return the tag in these bytes, or None if they have none."""
    try:
        return _tags.decode(body).type
    except Exception:  # skipped fields may be deeply nested garbage
        return None


def trajectory_id(group: str, sample: int) -> str:
    """Return the id of a trajectory from its group and sample number.

    >>> trajectory_id("g000007", 3)
    'g000007/3'
    """
    return f"{group}/{sample}"


def group_id(index: int) -> str:
    """Return the id of the group with this index.

    >>> group_id(7)
    'g000007'
    """
    return f"g{index:06d}"
