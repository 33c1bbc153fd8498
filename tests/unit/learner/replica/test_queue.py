"""The scoring queue: the order of rows, and the completion of records."""

import numpy as np
import pytest

from palimpsest.common.bus.port import Position
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.old_logprobs.scoring import rows_by_version
from palimpsest.services.learner.replica.queue import ScoringQueue
from tests.records.builders import a_segment

pytestmark = pytest.mark.thorough


def rows_of(*versions: int, trajectory: str = "g/0", tokens: int = 6) -> dict[Version, Row]:
    segments = [a_segment(i + 1, i + 2, v) for i, v in enumerate(versions)]
    return rows_by_version(trajectory, np.arange(tokens, dtype=np.int32), segments, 1.0)


def test_a_row_ends_with_its_versions_last_token() -> None:
    rows = rows_of(0, 1, 0, 2)
    assert {version: row.versions.tolist() for version, row in rows.items()} == {
        0: [-1, 0, -1, 0], 1: [-1, -1, 1], 2: [-1, -1, -1, -1, 2],
    }  # fmt: skip
    assert all(row.tokens.tolist() == list(range(len(row.tokens))) for row in rows.values())


def test_a_record_is_done_when_all_its_versions_are_scored() -> None:
    queue, at = ScoringQueue(), Position(0, 7)
    queue.add(rows_of(0, 1), at)
    (first,), (second,) = queue.take(Version(0)), queue.take(Version(1))
    assert len(queue) == 0
    assert queue.done(first) is None
    assert queue.done(second) == at


def test_requested_versions_come_first_then_the_loaded_one_then_ascending() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, 1), Position(0, 0))
    queue.add(rows_of(2, 3, trajectory="g/1"), Position(0, 1))
    assert queue.versions(None) == [0, 1, 2, 3]
    assert queue.versions(Version(2)) == [2, 0, 1, 3]
    queue.prioritize({Version(3): rows_of(2, 3, trajectory="g/1")[Version(3)]})
    assert queue.versions(Version(2)) == [3, 2, 0, 1]
    assert len(queue) == 4, "the row is queued already, so it is scored once"


def test_requested_rows_that_are_not_queued_are_scored_without_a_log_position() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0), Position(0, 0))
    queue.prioritize(rows_of(0, trajectory="g/9"))
    queue.prioritize(rows_of(0, 0))  # one token more than the queued row
    assert len(queue) == 3
    requested = queue.take(Version(0))
    assert [work.row.trajectory for work in requested] == ["g/9", "g/0"], "a batch waits for these, so they come first"
    (own,) = queue.take(Version(0))
    assert [queue.done(work) for work in (own, *requested)] == [Position(0, 0), None, None]


def test_unscored_jobs_return_to_the_queue_unless_their_partition_was_lost() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, trajectory="g/1"), Position(0, 0))
    queue.add(rows_of(0, trajectory="g/2"), Position(1, 0))
    queue.prioritize(rows_of(0, trajectory="g/3"))
    queue.prioritize(rows_of(0, trajectory="g/2"))
    urgent, rest = queue.take(Version(0)), queue.take(Version(0))
    assert [work.row.trajectory for work in (*urgent, *rest)] == ["g/2", "g/3", "g/1"]
    queue.forget(0)
    queue.put_back([*urgent, *rest])
    assert [work.row.trajectory for work in queue.take(Version(0))] == ["g/2", "g/3"]
    assert len(queue) == 0


def test_jobs_of_a_lost_partition_are_discarded() -> None:
    queue = ScoringQueue()
    queue.add(rows_of(0, 1), Position(0, 0))
    queue.add(rows_of(0), Position(1, 0))
    (begun,) = [work for work in queue.take(Version(0)) if work.origin == Position(0, 0)]
    queue.forget(0)
    assert queue.versions(None) == []
    assert queue.done(begun) is None
