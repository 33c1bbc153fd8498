"""Branches of an agent's session in the learner: rows, baseline, checks, flushes and scores."""

import numpy as np
import pytest
from msgspec import structs

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.branches import Branch, sequences
from palimpsest.common.bus.port import Position
from palimpsest.common.messages import (
    TRAJECTORIES,
    OldLogprobsComputed,
    SegmentFlushed,
    TrajectoryFinished,
    decode,
    encode,
)
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.collate import to_rows
from palimpsest.services.learner.buffer.flushes import FlushBuffer, Flushed
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.ingest.validation import validate
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore, prefix_digest
from palimpsest.services.learner.replica.queue import ScoringQueue
from tests.records.builders import a_finished, a_row, a_segment

VOCABULARY = 100


def branch(number: int, *, version: int = 1, start: int = 3) -> Branch:
    return Branch(number, pack_int32([9, 8, 7, 6, 5]), (a_segment(start, 5, version),), 1)


def branched(sample: int, reward: float, *branches: Branch) -> TrajectoryFinished:
    return structs.replace(a_finished(7, sample, reward=reward), branches=branches)


def test_a_record_without_branches_has_the_bytes_of_before() -> None:
    assert b"branches" not in encode(a_finished(7, 0))
    record = branched(0, 1.0, branch(1))
    assert decode(TRAJECTORIES, encode(record)) == record


def test_each_sequence_is_a_row_and_the_reward_counts_once() -> None:
    rows = to_rows([branched(0, 1.0, branch(1), branch(4)), branched(1, 0.0)], "reinforce_pp_baseline", lowest=1)
    assert [row.trajectory for row in rows] == ["g000007/0", "g000007/0+1", "g000007/0+4", "g000007/1"]
    assert [row.advantage for row in rows] == [0.5, 0.5, 0.5, -0.5]
    assert rows[1].versions.tolist() == [-1, -1, -1, 1, 1]
    assert rows[0].versions.tolist() == [-1] * 8, "of version 0, below the bound"


def test_a_session_is_as_new_as_its_newest_branch() -> None:
    received = ReceivedTrajectory(branched(0, 1.0, branch(1, version=5)), 0, 0)
    assert (received.newest, received.sampled_from(0), received.sampled_from(1)) == (5, 6, 2)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (branched(0, 1.0, branch(0)), "numbered from 1"),
        (branched(0, 1.0, branch(2), branch(2)), "one number"),
        (branched(0, 1.0, branch(1, version=9)), "newest published version"),
        (branched(0, 1.0, branch(1, start=0)), "bytes of log-probs|no prefix"),
        (structs.replace(a_finished(7, 0), trajectory="g000007/0+1"), "numbered from 1"),
    ],
)
def test_a_malformed_branch_is_rejected(record: TrajectoryFinished, problem: str) -> None:
    with pytest.raises(MalformedTrajectory, match=problem):
        validate(record, Version(5), vocabulary=VOCABULARY)


def test_the_ledger_counts_a_session_once_and_knows_its_branches() -> None:
    ledger: TrajectoryLedger[str] = TrajectoryLedger(samples=2, groups_per_batch=1, max_staleness=1, time_limit_s=60)
    group = ledger.offer(now=0.0)
    assert ledger.status_of(group, f"{group}/1+2") is ArrivalStatus.NEW
    assert ledger.is_pending(f"{group}/1+2")
    assert ledger.arrive(group, f"{group}/1+2", "a branch is no record") is ArrivalStatus.UNKNOWN
    assert ledger.counts()["offered"] == 2


def flushed(name: str, tokens: list[int], offset: int) -> Flushed:
    record = SegmentFlushed(
        "test", name, "g000007", 0, "w", 1, pack_int32(tokens), (a_segment(2, len(tokens), 0),), 1.0
    )
    return Flushed(record, 0, offset)


def test_the_flushes_of_branches_live_as_long_as_their_session() -> None:
    buffer = FlushBuffer()
    main, longer = flushed("g000007/0", [1, 2, 3], 0), flushed("g000007/0", [1, 2, 3, 4], 1)
    other = flushed("g000007/0+1", [1, 2, 3, 4, 5], 2)
    assert [buffer.add(one) for one in (main, longer, other)] == [[], [main], []]
    assert buffer.forget("g000007/0") == [longer, other]


def test_scores_are_found_by_their_prefix_in_any_sequence_of_the_session() -> None:
    scores = ScoreStore()
    scores.digests[Version(0)] = "d"
    tokens = pack_int32([1, 2, 3, 4])
    values = pack_float32([-1.0, -2.0])
    prefix = prefix_digest(tokens, 4)
    scores.put(
        OldLogprobsComputed(
            run="test", trajectory="g000007/0+3", start=2, stop=4, version=Version(0), digest="d", prefix=prefix,
            values=values, by="learner",
        )
    )  # fmt: skip
    same = scores.attach(a_row("g000007/0+2", [1, 2, 3, 4], [-1, -1, 0, 0]))
    other = scores.attach(a_row("g000007/0", [1, 2, 4, 4], [-1, -1, 0, 0]))
    assert same.old is not None
    assert same.old[2:].tolist() == [-1.0, -2.0]
    assert other.old is not None
    assert np.isnan(other.old).all()
    scores.forget("g000007/0")
    assert len(scores) == 0


def test_a_replica_commits_a_record_after_its_last_sequence() -> None:
    queue, at = ScoringQueue(), Position(0, 5)
    for part in sequences(branched(0, 1.0, branch(1))):
        queue.add({Version(0): a_row(part.trajectory, [1, 2], [-1, 0])}, at)
    first, second = queue.take(Version(0))
    assert (queue.done(first), queue.done(second)) == (None, at)
