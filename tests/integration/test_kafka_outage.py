"""A real Kafka killed during a stream: acknowledged records stay, readers skip nothing, and waits end."""

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from kafka.structs import MemberState

from palimpsest.common import failpoints
from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.kafka.consumer import KafkaConsumer
from palimpsest.common.bus.port import Consumer, Outgoing, Record
from palimpsest.common.outages import KAFKA, OUTAGES, Outages
from palimpsest.common.user_error import ExitCode, UserError
from tests.contract.logs import GROUP, PARTITIONS, TOPIC, bodies, everything, poll_until, take, things
from tests.processes.waiting import LIMIT_S, until
from tools.backends.kafka import Kafka

pytestmark = pytest.mark.servers

KEYS = [f"g{i}" for i in range(5)]
GIVE_UP_S = 4.0
LEASE_S = 5.0
ATTEMPTS = 30
HANGS_S = 3.0
"""Seconds. A single member gets its partitions in a tenth of this; a slow attempt is repeated."""
SOME = 50
"""Calls of `publish` between two events."""


class GivingUp(KafkaBus):
    """A bus that records when kafka-python stops sending records."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.gave_up = threading.Event()

    def _send(self, *arguments: Any) -> Exception | None:
        problem = super()._send(*arguments)
        if problem is not None:
            self.gave_up.set()
        return problem


def a_bus(kafka: Kafka, outage_limit_s: float = LIMIT_S) -> GivingUp:
    """A log with one new topic."""
    bus = GivingUp(
        Connection(kafka.servers, {}, outage_limit_s),
        prefix=f"outage.{uuid.uuid4().hex[:8]}.",
        lease_s=LEASE_S,
        give_up_s=GIVE_UP_S,
    )
    bus.create_topics({TOPIC: PARTITIONS})
    return bus


@pytest.fixture
def kafka(own_kafka: Kafka) -> Iterator[Kafka]:
    """The file's own broker; the fixture restarts it after the test."""
    yield own_kafka
    if not own_kafka.running:
        own_kafka.start()


class Stream:
    """Threads that publish numbers without pauses and read them, without a group and as the only member of a group."""

    def __init__(self, bus: KafkaBus) -> None:
        self.bus = bus
        self.acknowledged: list[int] = []
        self.alone: list[Record] = []
        self.member: list[Record] = []
        self._ended = threading.Event()
        self._published = threading.Event()
        self._threads = ThreadPoolExecutor(3)

    def __enter__(self) -> "Stream":
        self._work = [self._threads.submit(work) for work in (self._publish, self._read_alone, self._read_as_member)]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.shutdown()
        for work in self._work:
            work.result()

    def goes_on(self) -> None:
        """Wait until both readers have read records published after this call."""
        enough = len(self.acknowledged) + SOME
        until(lambda: len(self.acknowledged) > enough or any(work.done() for work in self._work))
        read = self.acknowledged[-1]
        until(lambda: all(
            any(int(record.body) >= read for record in records[-SOME * len(KEYS):])
            for records in (self.alone, self.member)
        ) or any(work.done() for work in self._work))  # fmt: skip

    def _publish(self) -> None:
        try:
            for call in range(1 << 30):
                if self._ended.is_set():
                    return
                numbers = [call * len(KEYS) + i for i in range(len(KEYS))]
                self.bus.publish(TOPIC, [Outgoing(KEYS[n % len(KEYS)], b"%d" % n) for n in numbers])
                self.acknowledged += numbers
        finally:
            self._published.set()

    def _read_alone(self) -> None:
        with self.bus.consumer(TOPIC) as consumer:
            self._read(consumer, self.alone, lambda records: None)

    def _read_as_member(self) -> None:
        with self.bus.consumer(TOPIC, group=GROUP, member="m") as consumer:
            self._read(
                consumer, self.member, lambda records: consumer.commit({r.partition: r.offset + 1 for r in records})
            )

    def _read(self, consumer: Consumer, into: list[Record], done: Callable[[list[Record]], None]) -> None:
        ends: dict[int, int] = {}
        while not ends or not all(consumed(into).get(p, 0) >= end for p, end in ends.items()):
            records = consumer.poll(limit=1000, timeout_s=0.2)
            into += records
            done(records)
            if self._published.is_set() and not ends:
                ends = consumer.ends()


def consumed(records: Sequence[Record]) -> dict[int, int]:
    """Partition -> offset after the last record read."""
    found: dict[int, int] = {}
    for record in records:
        found[record.partition] = max(found.get(record.partition, 0), record.offset + 1)
    return found


def offsets_in_order_of_reading(records: list[Record]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for record in records:
        found[record.partition].append(record.offset)
    return dict(found)


def first_readings(records: list[Record]) -> dict[str, list[int]]:
    """Key -> its numbers in the order of their first reading."""
    found: dict[str, dict[int, None]] = defaultdict(dict)
    for record in records:
        found[record.key].setdefault(int(record.body))
    return {key: list(numbers) for key, numbers in found.items()}


def ongoing(kafka: Kafka) -> list[dict[str, Any]]:
    """This broker's ongoing outages; the register of the process may hold outages of other tests."""
    return [outage for outage in OUTAGES.ongoing() if outage["address"] == kafka.servers]


def test_no_record_is_lost_or_skipped_when_the_broker_is_killed_and_restarted(kafka: Kafka) -> None:
    with closing(a_bus(kafka)) as bus, Stream(bus) as stream:
        stream.goes_on()
        kafka.kill()
        kafka.start()
        stream.goes_on()
        until(lambda: ongoing(kafka) == [])
        kafka.kill()
        assert bus.gave_up.wait(LIMIT_S)  # the records in flight are not on the log
        until(lambda: any(outage["until"] for outage in ongoing(kafka)))
        (outage,) = ongoing(kafka)
        assert outage["of"] == KAFKA
        assert outage["since"] < time.time() < outage["until"]
        kafka.start()
        stream.goes_on()
        until(lambda: ongoing(kafka) == [])
    found = first_readings(stream.alone)
    assert {n for numbers in found.values() for n in numbers} >= set(stream.acknowledged)
    assert all(numbers == sorted(numbers) for numbers in found.values())
    assert offsets_in_order_of_reading(stream.alone) == {p: list(range(n)) for p, n in consumed(stream.alone).items()}
    assert {(r.partition, r.offset) for r in stream.member} == {(r.partition, r.offset) for r in stream.alone}


def test_a_commit_during_an_outage_takes_effect(kafka: Kafka) -> None:
    with closing(a_bus(kafka)) as bus:
        (at,) = bus.publish(TOPIC, things("a"))
        with bus.consumer(TOPIC, group=GROUP, member="m") as member, ThreadPoolExecutor(1) as thread:
            take(member, 1)
            kafka.kill()
            committed = thread.submit(member.commit, {at.partition: at.offset + 1})
            kafka.start()
            committed.result(LIMIT_S)
        bus.publish(TOPIC, things("b"))
        with bus.consumer(TOPIC, group=GROUP, member="n") as successor:
            assert bodies(take(successor, 1)) == ["b"]


def test_without_the_check_of_sends_an_outage_loses_records(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(a_bus(kafka)) as bus:
        bus.publish(TOPIC, things("before"))
        kafka.kill()
        monkeypatch.setenv(failpoints.VARIABLE, "bus.unchecked_sends")
        bus.publish(TOPIC, things("during"))
        assert bus.gave_up.is_set()
        kafka.start()
        monkeypatch.delenv(failpoints.VARIABLE)
        bus.publish(TOPIC, things("after"))
        with bus.consumer(TOPIC) as consumer:
            assert bodies(take(consumer, sum(consumer.ends().values()))) == ["before", "after"]


def test_an_outage_beyond_the_limit_fails_every_call_but_poll(kafka: Kafka) -> None:
    with (
        closing(a_bus(kafka, outage_limit_s=1.0)) as bus,
        bus.consumer(TOPIC) as reader,
        bus.consumer(TOPIC) as other,
        bus.consumer(TOPIC, group=GROUP, member="m") as member,
    ):
        (at,) = bus.publish(TOPIC, things("a"))
        assert take(reader, 1) == take(member, 1)
        kafka.kill()
        calls: list[Callable[[], Any]] = [
            lambda: bus.publish(TOPIC, things("b")),
            other.ends,
            lambda: member.commit({at.partition: at.offset + 1}),
        ]
        with ThreadPoolExecutor(len(calls)) as threads:
            ended = [threads.submit(call) for call in calls]
            while not all(work.done() for work in ended):
                assert reader.poll(limit=10, timeout_s=0.2) == []
        for work in ended:
            with pytest.raises(UserError, match=rf"Kafka at {kafka.servers} \(bus.servers\): could not") as failure:
                work.result()
            assert failure.value.code is ExitCode.UNAVAILABLE
        kafka.start()
        bus._connection = replace(bus._connection, outage_limit_s=LIMIT_S)  # the broker may take long to restart
        bus.publish(TOPIC, things("c"))
        assert bodies(take(reader, 1)) == bodies(take(member, 1)) == ["c"]


def test_a_waiting_reader_records_an_outage_and_its_end(kafka: Kafka) -> None:
    outages = Outages()
    bus = KafkaBus(Connection(kafka.servers, {}, outages=outages), prefix=f"outage.{uuid.uuid4().hex[:8]}.")
    bus.create_topics({TOPIC: PARTITIONS})
    with closing(bus), bus.consumer(TOPIC) as reader:
        bus.publish(TOPIC, things("a"))
        take(reader, 1)
        poll_until(lambda: outages.ongoing() == [], reader)
        kafka.kill()
        poll_until(lambda: outages.ongoing() != [], reader)
        (outage,) = outages.ongoing()
        assert (outage["of"], outage["address"], outage["until"]) == (KAFKA, kafka.servers, None)
        kafka.start()
        poll_until(lambda: outages.ongoing() == [], reader)
        bus.publish(TOPIC, things("b"))
        assert bodies(take(reader, 1)) == ["b"]


class Unseeing(KafkaConsumer):
    """Joins its group the first time without metadata of the topic."""

    _begun = False

    def _join(self) -> None:
        if self._begun:
            return super()._join()
        self._client.subscribe([self._named], listener=self._listener)
        self._subscribed, self._stable_at, self._begun = True, time.monotonic(), True
        return None


class Hanging(KafkaConsumer):
    """Its first client never gets a share of its group."""

    _clients = 0

    def _connect(self, limit_s: float) -> Any:
        client = super()._connect(limit_s)
        if self._clients == 0:
            client.poll = lambda **_: {}
        self._stuck_s = LIMIT_S if self._clients else 0.5  # the second client may take its time
        self._clients += 1
        return client


def test_a_hanging_group_membership_is_restarted(kafka: Kafka) -> None:
    connection, prefix = Connection(kafka.servers, {}), f"stuck.{uuid.uuid4().hex[:8]}."
    with closing(KafkaBus(connection, prefix=prefix)) as bus:
        bus.create_topics({TOPIC: PARTITIONS})
        bus.publish(TOPIC, things("a"))
        member = Hanging(connection, prefix, TOPIC, GROUP, "m", partitions=lambda: PARTITIONS, lease_s=LEASE_S)
        with member:
            poll_until(lambda: everything(member), member)
            assert member._clients == 2
            assert bodies(take(member, 1)) == ["a"]


@pytest.mark.long
def test_a_group_membership_of_kafka_python_that_hangs_is_restarted(kafka: Kafka) -> None:
    """It hangs in one of three attempts."""
    connection = Connection(kafka.servers, {})
    for _ in range(ATTEMPTS):
        prefix = f"stuck.{uuid.uuid4().hex[:8]}."
        with closing(KafkaBus(connection, prefix=prefix)) as bus:
            bus.create_topics({TOPIC: PARTITIONS})
            with Unseeing(
                connection, prefix, TOPIC, GROUP, "m", partitions=lambda: PARTITIONS, lease_s=LEASE_S
            ) as member:
                client, began = member._client, time.monotonic()
                while not everything(member) and time.monotonic() - began < HANGS_S:
                    member.poll(limit=1, timeout_s=0.01)
                if everything(member) or client.group_metadata().state != MemberState.REBALANCING:
                    continue  # the client did not hang, as in two of three attempts
                member._stuck_s = 1.0
                poll_until(lambda: everything(member), member)
                if member._client is client:
                    continue  # the client was only slow
                bus.publish(TOPIC, things("a"))
                assert bodies(take(member, 1)) == ["a"]
                return
    raise AssertionError(f"the client did not hang in {ATTEMPTS} attempts: is the restart of members still needed?")


@pytest.mark.parametrize("watched", [True, False])
def test_a_hanging_producer_is_restarted(kafka: Kafka, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not watched:
        monkeypatch.setattr(KafkaBus, "_restart_producer", lambda *_: None)
    bus = KafkaBus(
        Connection(kafka.servers, {}, outage_limit_s=LIMIT_S if watched else 3.0),
        prefix=f"stuck.{uuid.uuid4().hex}.",
        give_up_s=1.0,
    )
    bus.create_topics({TOPIC: PARTITIONS})
    with closing(bus), ThreadPoolExecutor(2) as threads:
        bus.publish(TOPIC, things("a"))
        stuck = bus._producer
        stuck._sender.run_once = lambda: time.sleep(0.01)  # as kafka-python's sender may do after an outage
        sent = [threads.submit(bus.publish, TOPIC, things(body)) for body in "bc"]
        if not watched:
            with pytest.raises(UserError, match=f"could not write to {TOPIC}"):
                sent[0].result()
            return
        assert sorted(future.result()[0].offset for future in sent) == [1, 2]
        assert bus._producer is not stuck
        assert not stuck._sender.is_alive()
        with bus.consumer(TOPIC) as consumer:
            assert sorted(bodies(take(consumer, 3))) == ["a", "b", "c"]
