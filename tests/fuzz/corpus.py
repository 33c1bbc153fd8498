"""Real records of every topic, to mutate: of trajectories that the learner awaits, and of others."""

import random
from collections.abc import Sequence

import msgspec

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutReleased,
    CutRequested,
    DeadLetter,
    DropReason,
    GroupOffered,
    OldLogprobsComputed,
    OldLogprobsRequested,
    RunFinished,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    encode,
    trajectory_id,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.versions import Version
from tests.records.builders import SAMPLING, a_finished, a_segment

RUN, DIGEST, WRITER, HIGHEST = "test", "c3" * 32, 3, 5
"""WRITER: epoch of the learner that has the run. HIGHEST: newest version that the run published."""
SHARES = {TRAJECTORIES: 10, OLD_LOGPROBS: 3, WORKERS: 2, CONTROL: 3, TASKS: 2, DEAD_LETTERS: 1}
"""Topic -> share of the records. Trajectories are what trains the model."""


def record(topic: str, open_groups: Sequence[int], rng: random.Random) -> Outgoing:
    """Return a valid record of the topic. open_groups: indexes of the groups that the learner awaits."""
    index, sample, version = rng.choice(open_groups), rng.randrange(2), Version(rng.randrange(HIGHEST + 1))
    finished = a_finished(index, sample, segments=(a_segment(2, 6, version),), reward=rng.choice((0.0, 0.5, 1.0)))
    message = rng.choice(_messages(topic, index, version, finished))
    headers = {"trajectory": finished.trajectory} if topic == TRAJECTORIES else {}
    return Outgoing(finished.group, encode(message), headers)


def _messages(topic: str, index: int, version: Version, finished: TrajectoryFinished) -> list[msgspec.Struct]:
    name, group, tokens, segments = finished.trajectory, finished.group, finished.tokens, finished.segments
    match topic:
        case "trajectories":
            dropped = TrajectoryDropped(RUN, name, group, "worker-0", DropReason.ENGINE_FAILED, "busy")
            flushed = SegmentFlushed(RUN, name, group, 0, "worker-0", 3, tokens, segments, 1.0)
            return [finished, finished, finished, finished, dropped, flushed]
        case "tasks":
            return [GroupOffered(RUN, group, index, version, "lookup", 7, 2, SAMPLING, 600.0, WRITER)]
        case "control":
            return [
                VersionPublished(RUN, version, DIGEST, 1.0, WRITER),
                CutRequested(RUN, index + 1, version, 5.0, WRITER),
                CutReleased(RUN, index + 1, WRITER),
                RunFinished(RUN, version, WRITER),
            ]
        case "workers":
            return [
                WorkerAlive(RUN, "worker-0", version, 3, 100, 2.0, 0.5),
                VersionApplied(RUN, "worker-0", version, DIGEST, True, 0.01, 0.1, 2),
                CutReached(RUN, "worker-0", index + 1, version, {0: 17, 1: 300}, 2, 0.25),
            ]
        case "old_logprobs":
            values = segments[0].behavior_logprobs
            return [
                OldLogprobsRequested(RUN, name, tokens, segments, 1.0),
                OldLogprobsComputed(RUN, name, "replica-0", version, DIGEST, 2, 6, "5a" * 32, values),
            ]
        case _:
            headers = {"trajectory": trajectory_id(group, 0)}
            body, cause = encode(finished), RejectCause.UNDECODABLE
            return [DeadLetter(RUN, TRAJECTORIES, 1, 9, group, headers, body, cause, "not msgpack", 1.0)]
