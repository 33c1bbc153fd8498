"""The outbox: a record is done only when it is durable; no record is lost or reordered."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.bus.port import Outgoing, Position, partition_of
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TRAJECTORIES,
    WORKERS,
    DeadLetter,
    SegmentFlushed,
    WorkerAlive,
    decode,
    group_id,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.services.rollout.outbox import BATCH, Outbox
from tests.processes.waiting import LIMIT_S
from tests.records.builders import a_finished

Topic = str


class FailingBus(SqliteBus):
    """A bus that counts publishes and fails from the n-th one on."""

    def __init__(self, path: Path, *, fails_at: int | None = None) -> None:
        super().__init__(path)
        self.create_topics({TRAJECTORIES: 2, WORKERS: 1, DEAD_LETTERS: 1})
        self.fails_at = fails_at
        self.sizes: list[int] = []

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if self.fails_at is not None and len(self.sizes) >= self.fails_at:
            raise OSError("the disk is gone")
        self.sizes.append(len(records))
        return super().publish(topic, records)

    def numbers(self) -> dict[Topic, list[int]]:
        """Numbers of the published records per topic."""
        return {topic: [_number(topic, body) for body in self._bodies(topic)] for topic in PUTS}

    def _bodies(self, topic: str) -> list[bytes]:
        bodies: list[bytes] = []
        with self.consumer(topic) as consumer:
            while records := consumer.poll(limit=1000, timeout_s=0):
                bodies += [record.body for record in records]
        return bodies


def _put_trajectory(outbox: Outbox, number: int, done: Callable[[], None]) -> None:
    record = a_finished(0, number)  # one group means one partition, which keeps the order
    outbox.put_trajectory(record, group=record.group, trajectory=record.trajectory, done=done)


def _put_alive(outbox: Outbox, number: int, done: Callable[[], None]) -> None:
    outbox.put_from_worker(
        WorkerAlive(run="test", worker="w", version=0, live=number, sampled_tokens=0, seconds=0.0, idle_s=0.0)
    )


def _put_dead_letter(outbox: Outbox, number: int, done: Callable[[], None]) -> None:
    letter = DeadLetter("test", "tasks", 0, number, "key", {}, b"body", RejectCause.UNDECODABLE, "?", 0.0)
    outbox.put_dead_letter(letter, done=done)


PUTS = {TRAJECTORIES: _put_trajectory, WORKERS: _put_alive, DEAD_LETTERS: _put_dead_letter}


def _number(topic: Topic, body: bytes) -> int:
    message = decode(topic, body)
    if topic == TRAJECTORIES:
        return int(message.trajectory.rpartition("/")[2])
    return int(message.live if topic == WORKERS else message.offset)


def run(test: Callable[[FailingBus], Awaitable[None]], *, fails_at: int | None = None) -> None:
    """Run a test with a new log."""
    with TemporaryDirectory() as folder, closing(FailingBus(Path(folder) / "bus.sqlite", fails_at=fails_at)) as bus:
        asyncio.run(asyncio.wait_for(test(bus), LIMIT_S))


puts = st.lists(st.lists(st.sampled_from(sorted(PUTS)), max_size=8), min_size=1, max_size=6)
"""Bursts of records; the outbox runs between two bursts."""


@pytest.mark.thorough
@given(bursts=puts, fails_at=st.none() | st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_record_is_done_exactly_when_it_is_durable(bursts: list[list[Topic]], fails_at: int) -> None:
    async def test(bus: FailingBus) -> None:
        outbox, put, done = Outbox(bus), list[tuple[Topic, int]](), list[tuple[Topic, int]]()

        def is_done(topic: Topic, number: int) -> None:
            assert number in bus.numbers()[topic], "done before it stands on the log"
            done.append((topic, number))

        publishing = asyncio.create_task(outbox.run())
        for burst in bursts:
            for topic in burst:
                number = len(put)
                put.append((topic, number))
                PUTS[topic](outbox, number, lambda topic=topic, number=number: is_done(topic, number))
            await asyncio.sleep(0)
        flushing = asyncio.create_task(outbox.flush())
        await asyncio.wait({publishing, flushing}, return_when=asyncio.FIRST_COMPLETED)
        if publishing.done():
            assert str(publishing.exception()) == "the disk is gone"
            assert not flushing.done(), "what is not durable is never flushed"
        else:
            assert bus.numbers() == {topic: [n for t, n in put if t == topic] for topic in PUTS}
            assert done == [(topic, number) for topic, number in put if topic != WORKERS]
        publishing.cancel()
        flushing.cancel()
        await asyncio.gather(publishing, flushing, return_exceptions=True)

    run(test, fails_at=fails_at)


def test_a_partly_failed_batch_is_not_done() -> None:
    """The trajectory is on the log and the dead letter is not; a restart reads both tasks again."""
    done: list[str] = []

    async def test(bus: FailingBus) -> None:
        outbox = Outbox(bus)
        _put_trajectory(outbox, 0, lambda: done.append("trajectory"))
        _put_dead_letter(outbox, 1, lambda: done.append("dead letter"))
        with pytest.raises(OSError, match="the disk is gone"):
            await outbox.run()
        assert bus.numbers() == {TRAJECTORIES: [0], WORKERS: [], DEAD_LETTERS: []}

    run(test, fails_at=1)
    assert done == []


def test_many_records_are_published_in_batches() -> None:
    async def test(bus: FailingBus) -> None:
        outbox, done = Outbox(bus), list[int]()
        for number in range(2 * BATCH + 3):
            _put_trajectory(outbox, number, lambda number=number: done.append(number))
        publishing = asyncio.create_task(outbox.run())
        await outbox.flush()
        assert bus.sizes == [BATCH, BATCH, 3]
        assert done == bus.numbers()[TRAJECTORIES] == list(range(2 * BATCH + 3))
        publishing.cancel()

    run(test)


def test_an_empty_outbox_is_flushed() -> None:
    async def test(bus: FailingBus) -> None:
        await Outbox(bus).flush()

    run(test)


def test_positions_are_those_of_its_own_last_trajectories() -> None:
    """Records of other publishers, before or between, do not count."""

    async def test(bus: FailingBus) -> None:
        outbox, others = Outbox(bus), Outgoing("g000000", b"another worker's")
        bus.publish(TRAJECTORIES, [others] * 3)
        assert outbox.positions == {}
        publishing = asyncio.create_task(outbox.run())
        _put_alive(outbox, 0, lambda: None)
        await outbox.flush()
        assert outbox.positions == {}
        _put_trajectory(outbox, 0, lambda: None)
        await outbox.flush()
        assert outbox.positions == {partition_of("g000000", 2): 4}
        bus.publish(TRAJECTORIES, [others] * 5)
        elsewhere = next(index for index in range(9) if partition_of(group_id(index), 2) != partition_of("g000000", 2))
        record = a_finished(elsewhere, 0)
        outbox.put_trajectory(record, group=record.group, trajectory=record.trajectory, done=lambda: None)
        await outbox.flush()
        assert outbox.positions == {partition_of("g000000", 2): 4, partition_of(record.group, 2): 1}
        publishing.cancel()

    run(test)


def test_a_flush_does_not_wait_for_later_records() -> None:
    """Otherwise a flush of a worker that publishes all the time would never end."""

    async def test(bus: FailingBus) -> None:
        outbox = Outbox(bus)
        _put_trajectory(outbox, 0, lambda: _put_trajectory(outbox, 1, lambda: None))
        flushed = asyncio.create_task(outbox.flush())
        await asyncio.sleep(0)
        bus.fails_at = 1
        with pytest.raises(OSError, match="the disk is gone"):
            await outbox.run()
        await flushed
        assert bus.numbers()[TRAJECTORIES] == [0]

    run(test)


def test_a_flushed_segment_has_no_header_that_ends_its_trajectory() -> None:
    """A reader that cannot decode it must not count the trajectory as lost, because its end is still to come."""

    async def test(bus: FailingBus) -> None:
        outbox, end = Outbox(bus), a_finished(7, 3)
        record = SegmentFlushed(
            end.run, end.trajectory, end.group, 0, "w", 1, end.tokens, end.segments, end.temperature
        )  # fmt: skip
        outbox.put_flush(record)
        publishing = asyncio.create_task(outbox.run())
        await outbox.flush()
        publishing.cancel()
        with bus.consumer(TRAJECTORIES) as consumer:
            (read,) = consumer.poll(limit=10, timeout_s=0)
        assert (read.key, dict(read.headers)) == ("g000007", {})
        assert decode(TRAJECTORIES, read.body) == record
        assert outbox.positions == {read.partition: 1}

    run(test)


def test_a_trajectory_carries_its_group_as_key_and_its_id_in_a_header() -> None:
    """The learner's ledger needs the id of a record whose body it cannot read."""

    async def test(bus: FailingBus) -> None:
        outbox = Outbox(bus)
        record = a_finished(7, 3)
        outbox.put_trajectory(record, group=record.group, trajectory=record.trajectory, done=lambda: None)
        publishing = asyncio.create_task(outbox.run())
        await outbox.flush()
        publishing.cancel()
        with bus.consumer(TRAJECTORIES) as consumer:
            (read,) = consumer.poll(limit=10, timeout_s=0)
        assert (read.key, dict(read.headers)) == ("g000007", {"trajectory": "g000007/3"})
        assert decode(TRAJECTORIES, read.body) == record

    run(test)


async def test_readers_wait_while_too_many_dead_letters_are_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palimpsest.services.rollout.outbox.DEAD_LETTER_BYTES", 1000)
    with closing(FailingBus(tmp_path / "bus.sqlite")) as bus:
        outbox = Outbox(bus)
        for number in range(100):
            _put_trajectory(outbox, number, lambda: None)
        await asyncio.wait_for(outbox.room(), LIMIT_S)  # trajectories do not count
        for number in range(20):
            _put_dead_letter(outbox, number, lambda: None)
        waiting = asyncio.create_task(outbox.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        publishing = asyncio.create_task(outbox.run())
        await asyncio.wait_for(waiting, LIMIT_S)
        publishing.cancel()
