"""Three clients of a Kafka: our log as services open it, kafka-python, and confluent-kafka.

A client publishes records and returns when all are acknowledged. A reader reads from its position until it has `count`
bodies. All clients wait for every replica (acks=all) and are idempotent.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import confluent_kafka
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from bench.runs import NoClaims, run
from palimpsest.common.bus.factory import connect
from palimpsest.common.bus.kafka.bus import BATCH_BYTES
from palimpsest.common.bus.port import Consumer, Outgoing, partition_of
from palimpsest.common.messages import TRAJECTORIES
from palimpsest.services.learner.ingest.trajectory_reader import POLL_RECORDS
from palimpsest.services.rollout.outbox import BATCH

PARTITIONS = 4
WAIT_S = 60.0
"""Time limit of every operation."""


class Reader(Protocol):
    """A connected consumer at the end of every partition, without prefetched records."""

    def read(self, count: int) -> list[bytes]:
        """Return the bodies of the next `count` records. Called once."""

    def close(self) -> None:
        """Close the connections."""


class Client(Protocol):
    """A client with its own topic of PARTITIONS partitions."""

    topic: str

    def publish(self, records: Sequence[Outgoing]) -> None:
        """Return when all records are acknowledged. Raises if one fails."""

    def reader(self, topic: str) -> Reader:
        """Return a new reader of its own topic, or of the topic of `ours`."""

    def close(self) -> None:
        """Close the connections."""


class Ours:
    """The log as services open it: KafkaBus in ClaimCheck. Publishes batches of the outbox size, one at a time."""

    def __init__(self, servers: str, prefix: str) -> None:
        config = run(Path(tempfile.gettempdir()), {"kind": "kafka", "servers": servers, "topic_prefix": prefix})
        self._bus = connect(config, NoClaims())
        self._bus.create_topics({TRAJECTORIES: PARTITIONS})
        self.topic = config.topic_prefix + TRAJECTORIES

    def publish(self, records: Sequence[Outgoing]) -> None:
        """See Client."""
        for at in range(0, len(records), BATCH):
            batch = records[at : at + BATCH]
            assert len(self._bus.publish(TRAJECTORIES, batch)) == len(batch)

    def reader(self, topic: str) -> "OurReader":
        """See Client."""
        assert topic == self.topic, f"{topic} is no topic of this run"
        return OurReader(self._bus.consumer(TRAJECTORIES))

    def close(self) -> None:
        """See Client."""
        self._bus.close()


class OurReader:
    """Polls as many records as the reader of the learner."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer, self.close = consumer, consumer.close
        consumer.seek(consumer.ends())

    def read(self, count: int) -> list[bytes]:
        """See Reader."""
        return _until(count, lambda _: [r.body for r in self._consumer.poll(limit=POLL_RECORDS, timeout_s=1.0)])


class Bare:
    """kafka-python as in its documentation. settings: of the producer, besides acks and idempotence."""

    def __init__(self, servers: str, topic: str, **settings: Any) -> None:
        self._servers, self.topic = servers, topic
        self._producer = KafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True, **settings)

    def publish(self, records: Sequence[Outgoing]) -> None:
        """See Client."""
        futures = [
            self._producer.send(
                self.topic,
                key=record.key.encode(),
                value=record.body,
                headers=[(name, value.encode()) for name, value in record.headers.items()],
                partition=partition_of(record.key, PARTITIONS),
            )
            for record in records
        ]
        self._producer.flush(WAIT_S)
        for future in futures:
            future.get(timeout=0)

    def reader(self, topic: str) -> "BareReader":
        """See Client."""
        return BareReader(self._servers, topic)

    def close(self) -> None:
        """See Client."""
        self._producer.close()


class BareReader:
    """poll() of kafka-python with default settings."""

    def __init__(self, servers: str, topic: str) -> None:
        partitions = [TopicPartition(topic, p) for p in range(PARTITIONS)]
        self._consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="none", enable_auto_commit=False)
        self._consumer.assign(partitions)
        for tp, offset in self._consumer.end_offsets(partitions).items():
            self._consumer.seek(tp, offset)
        self.close = self._consumer.close

    def read(self, count: int) -> list[bytes]:
        """See Reader."""
        return _until(
            count,
            lambda _: [r.value for records in self._consumer.poll(timeout_ms=1000).values() for r in records],
        )


class Confluent:
    """confluent-kafka (librdkafka, in C) as its documentation shows it."""

    def __init__(self, servers: str, topic: str) -> None:
        self._servers, self.topic = servers, topic
        self._producer = confluent_kafka.Producer(
            {"bootstrap.servers": servers, "acks": "all", "enable.idempotence": True, "log_level": 2}
        )

    def publish(self, records: Sequence[Outgoing]) -> None:
        """See Client."""
        acknowledged, problems = 0, []

        def on_delivery(error: Any, _message: Any) -> None:
            nonlocal acknowledged
            if error is None:
                acknowledged += 1
            else:
                problems.append(error)

        for record in records:
            self._produce(record, on_delivery)
        left = self._producer.flush(WAIT_S)
        assert (left, acknowledged) == (0, len(records)), problems[:1]

    def reader(self, topic: str) -> "ConfluentReader":
        """See Client."""
        return ConfluentReader(self._servers, topic)

    def close(self) -> None:
        """See Client."""
        assert self._producer.flush(WAIT_S) == 0

    def _produce(self, record: Outgoing, on_delivery: Callable[[Any, Any], None]) -> None:
        while True:
            try:
                self._producer.produce(
                    self.topic,
                    key=record.key.encode(),
                    value=record.body,
                    headers=[(name, value.encode()) for name, value in record.headers.items()],
                    partition=partition_of(record.key, PARTITIONS),
                    on_delivery=on_delivery,
                )
            except BufferError:  # the queue of the producer is full
                self._producer.poll(0.1)
            else:
                self._producer.poll(0)
                return


class ConfluentReader:
    """Polls as many records as OurReader. It prefetches once it has partitions, so only `read` assigns them."""

    def __init__(self, servers: str, topic: str) -> None:
        self._consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": "unused",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "log_level": 2,
            }
        )
        self._partitions = [confluent_kafka.TopicPartition(topic, p) for p in range(PARTITIONS)]
        for tp in self._partitions:
            _, tp.offset = self._consumer.get_watermark_offsets(tp, timeout=WAIT_S)
        self.close = self._consumer.close

    def read(self, count: int) -> list[bytes]:
        """See Reader."""
        self._consumer.assign(self._partitions)
        return _until(count, lambda left: [_body(m) for m in self._consumer.consume(min(POLL_RECORDS, left), 1.0)])


def clients(servers: str, prefix: str) -> dict[str, Client]:
    """Return all clients by name. Creates a topic for each."""
    by_name: dict[str, Client] = {"ours": Ours(servers, f"{prefix}ours.")}
    topics = {}
    for name in ("bare", "bare_defaults", "confluent"):
        Ours(servers, f"{prefix}{name}.").close()  # creates the topic with the same settings
        topics[name] = f"{prefix}{name}.{TRAJECTORIES}"
    by_name["bare"] = Bare(servers, topics["bare"], batch_size=BATCH_BYTES)
    by_name["bare_defaults"] = Bare(servers, topics["bare_defaults"])
    by_name["confluent"] = Confluent(servers, topics["confluent"])
    return by_name


def _until(count: int, poll: Callable[[int], list[bytes]]) -> list[bytes]:
    """Return the bodies of `count` records. `poll` receives the number of missing records."""
    bodies: list[bytes] = []
    deadline = time.monotonic() + WAIT_S
    while len(bodies) < count:
        bodies += poll(count - len(bodies))
        assert time.monotonic() < deadline, f"{len(bodies)} of {count} records arrived in {WAIT_S:.0f} s"
    return bodies


def _body(message: Any) -> bytes:
    assert message.error() is None, message.error()
    body: bytes = message.value()
    return body
