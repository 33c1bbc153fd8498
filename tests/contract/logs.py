"""Logs for the contract suite, and functions that read them."""

import itertools
import sqlite3
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.admin import KafkaAdminClient

from palimpsest.common.bus.claim_check import ClaimCheck
from palimpsest.common.bus.kafka import Connection as KafkaConnection, KafkaBus
from palimpsest.common.bus.port import Bus, Consumer, Outgoing, Record
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.snapshots.client import SnapshotClient
from tests.processes.waiting import LIMIT_S
from tests.simulation.memory_bus import MemoryBus, Store

TOPIC, PARTITIONS, GROUP = "things", 4, "workers"
KEYS = [f"g{i:06d}" for i in range(60)]


@dataclass(frozen=True)
class SqliteLog:
    """A log in a SQLite file. Any process may call `open`."""

    path: Path
    lease_s: float = 10.0

    def open(self) -> Bus:
        return SqliteBus(self.path, lease_s=self.lease_s)

    def with_lease(self, lease_s: float) -> "SqliteLog":
        """The same log with another lease of its group members, seconds."""
        return replace(self, lease_s=lease_s)

    def another(self) -> "SqliteLog":
        """A new log that no process has opened."""
        return replace(self, path=self.path.parent / "another" / "bus.sqlite")

    def cut(self, partition: int, before: int) -> None:
        """Delete the partition's records below this offset, as retention does."""
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute(
                "DELETE FROM records WHERE topic = ? AND partition = ? AND offset < ?", (TOPIC, partition, before)
            )
            db.execute("UPDATE ends SET first = ? WHERE topic = ? AND partition = ?", (before, TOPIC, partition))


@dataclass(frozen=True)
class MemoryLog:
    """A log in the memory of this process; unusable for tests with several processes."""

    store: Store = field(default_factory=Store)
    lease_s: float = 10.0

    def open(self) -> Bus:
        return MemoryBus(self.store, lease_s=self.lease_s)

    def with_lease(self, lease_s: float) -> "MemoryLog":
        """The same log with another lease of its group members, seconds."""
        return replace(self, lease_s=lease_s)

    def another(self) -> "MemoryLog":
        """A new log."""
        return MemoryLog()

    def cut(self, partition: int, before: int) -> None:
        """Delete the partition's records below this offset, as retention does."""
        self.store.cut(TOPIC, partition, before)


@dataclass(frozen=True)
class KafkaLog:
    """Topics with a unique prefix on a real Kafka, long bodies in a snapshot store. Any process may call `open`."""

    servers: str
    store_url: str
    prefix: str = field(default_factory=lambda: f"test.{uuid.uuid4().hex[:12]}.")
    lease_s: float = 10.0

    def open(self) -> Bus:
        bus = KafkaBus(KafkaConnection(self.servers, {}), prefix=self.prefix, lease_s=self.lease_s)
        return ClaimCheck(bus, SnapshotClient(self.store_url), over_bytes=1 << 19)

    def with_lease(self, lease_s: float) -> "KafkaLog":
        """The same log with another lease of its group members, seconds."""
        return replace(self, lease_s=lease_s)

    def another(self) -> "KafkaLog":
        """A new log without topics."""
        return KafkaLog(self.servers, self.store_url)

    def cut(self, partition: int, before: int) -> None:
        """Delete the partition's records below this offset, as retention does."""
        with closing(KafkaAdminClient(bootstrap_servers=self.servers)) as admin:
            admin.delete_records({TopicPartition(self.prefix + TOPIC, partition): before})


Log = SqliteLog | MemoryLog | KafkaLog
Spawn = Callable[..., tuple[SpawnProcess, Connection]]


def receive(line: Connection) -> Any:
    """Next message from the process."""
    assert line.poll(LIMIT_S), "the process sent no message"
    return line.recv()


def receive_all(line: Connection) -> list[Any]:
    """All messages that a process sent before it died."""
    received = []
    try:
        while line.poll(LIMIT_S):
            received.append(line.recv())
    except (EOFError, ConnectionResetError):
        return received
    raise AssertionError("the process is still running")


def things(*bodies: str, key: str = "k") -> list[Outgoing]:
    return [Outgoing(key, body.encode()) for body in bodies]


def take(consumer: Consumer, count: int) -> list[Record]:
    """Read the next `count` records."""
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT_S
    while len(records) < count:
        assert time.monotonic() < deadline, f"received {len(records)} of {count} records"
        records += consumer.poll(limit=count - len(records), timeout_s=1.0)
    return records


def read_all(bus: Bus) -> list[Record]:
    with bus.consumer(TOPIC) as consumer:
        return take(consumer, sum(consumer.ends().values()))


def bodies(records: list[Record]) -> list[str]:
    return [record.body.decode() for record in records]


def poll_until(done: Callable[[], bool], *consumers: Consumer) -> list[Record]:
    """Poll the consumers in turn until done() holds. Returns all records read."""
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline, [consumer.assignment() for consumer in consumers]
        for consumer in consumers:
            records += consumer.poll(limit=1000, timeout_s=0.01)
    return records


def everything(consumer: Consumer) -> bool:
    """True if the consumer has every partition."""
    return consumer.assignment() == frozenset(range(PARTITIONS))


def shared(*consumers: Consumer) -> bool:
    """True if each partition belongs to exactly one consumer and each consumer has at least one."""
    shares = [consumer.assignment() for consumer in consumers]
    return all(shares) and sorted(itertools.chain(*shares)) == list(range(PARTITIONS))
