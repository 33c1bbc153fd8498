"""The log in one SQLite file (WAL mode): durable, for several processes of one machine.

`publish` returns after the commit is synced to disk. Group membership is a lease in the same file: a member that stops
polling loses its partitions after `lease_s` seconds. When it polls again, it continues from the commits of the group.
Leases are measured from the start of the machine, so a change of the wall clock has no effect on them. Readers poll
SQLite's data_version counter for new commits, which takes microseconds.
"""

import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from palimpsest.common.boot_clock import boot_id, boot_time
from palimpsest.common.bus.port import PARTITIONS_STAY, OffsetGone, Outgoing, Position, Record, partition_of

LEASE_S = 10.0
"""Time without a poll after which a group member loses its partitions, in seconds."""
LOOK_S = 0.01
"""Polling interval for new records, in seconds."""
BUSY_S = 30.0
"""Time to wait for the write of another process, in seconds."""
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
"""SQLite's error codes of a full disk: for its files, for their shared memory file."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (topic TEXT PRIMARY KEY, partitions INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    key TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (topic, partition, offset)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ends (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, first INTEGER NOT NULL, next INTEGER NOT NULL,
    PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commits (
    topic TEXT NOT NULL, grp TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (topic, grp, partition)) WITHOUT ROWID;
DROP TABLE IF EXISTS members;
CREATE TABLE IF NOT EXISTS member_leases (
    topic TEXT NOT NULL, grp TEXT NOT NULL, member TEXT NOT NULL, boot TEXT NOT NULL, heard REAL NOT NULL,
    PRIMARY KEY (topic, grp, member)) WITHOUT ROWID;
"""


class SqliteBus:
    """See common/bus/port.py. Safe to share between the threads of a process."""

    def __init__(
        self,
        path: Path,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = boot_time,
        boot: Callable[[], str] = boot_id,
    ) -> None:
        """`clock`: seconds since the start of the machine that `boot` names."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))  # SQLite's own error names no cause
        self.path = path
        self._lease_s, self._clock, self._boot = lease_s, clock, boot()
        self._lock = threading.RLock()
        self._db = _open(path)
        with self._lock, _writing(self._db):
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        with self._lock, _writing(self._db):
            for topic, count in partitions.items():
                self._db.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", (topic, count))
                (existing,) = self._db.execute("SELECT partitions FROM topics WHERE topic = ?", (topic,)).fetchone()
                if existing != count:
                    raise ValueError(
                        f"topic {topic} in {self.path} has {existing} partitions; the run needs {count}\n"
                        f"{PARTITIONS_STAY}"
                    )
                self._db.executemany(
                    "INSERT OR IGNORE INTO ends VALUES (?, ?, 0, 0)", [(topic, p) for p in range(count)]
                )

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if not records:
            return []
        with self._lock, _writing(self._db):
            ends = _ends(self._db, topic)
            positions = []
            for record in records:
                partition = partition_of(record.key, len(ends))
                positions.append(Position(partition, ends[partition]))
                ends[partition] += 1
            self._db.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (topic, at.partition, at.offset, r.key, json.dumps(dict(r.headers)), r.body)
                    for at, r in zip(positions, records, strict=True)
                ],
            )
            self._db.executemany(
                "UPDATE ends SET next = ? WHERE topic = ? AND partition = ?",
                [(ends[p], topic, p) for p in {at.partition for at in positions}],
            )
        return positions

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> "SqliteConsumer":
        return SqliteConsumer(
            self.path, topic, group, member, lease_s=self._lease_s, clock=self._clock, boot=self._boot
        )

    def close(self) -> None:
        with self._lock:
            self._db.close()


class SqliteConsumer:
    """See common/bus/port.py. Belongs to one thread at a time."""

    def __init__(
        self,
        path: Path,
        topic: str,
        group: str | None,
        member: str,
        *,
        lease_s: float,
        clock: Callable[[], float],
        boot: str,
    ) -> None:
        if group is not None and not member:
            raise ValueError(f"a consumer of group {group} needs a member name")
        self._db = _open(path)
        self._topic, self._group, self._member, self._lease_s = topic, group, member, lease_s
        self._clock, self._boot = clock, boot
        self._next: dict[int, int] = {}
        self._heard = float("-inf")
        self._seen = -1
        self._turn = 0
        if group is None:
            self._next = {p: first for p, (first, _) in _bounds(self._db, topic).items()}

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._keep_membership()
            if records := self._read(limit):
                return records
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            self._wait(min(left, self._lease_s / 3))

    def assignment(self) -> frozenset[int]:
        return frozenset(self._next)

    def seek(self, offsets: Mapping[int, int]) -> None:
        bounds = _bounds(self._db, self._topic)
        for partition, offset in offsets.items():
            if partition not in bounds:
                raise OffsetGone(f"{self._topic} has no partition {partition}: the log belongs to another run")
            first, end = bounds[partition]
            if not first <= offset <= end:
                raise OffsetGone(
                    f"{self._topic}[{partition}] holds offsets {first} to {end}, not {offset}: the log was truncated "
                    f"or belongs to another run"
                )
        self._next.update(offsets)
        self._seen = -1

    def commit(self, offsets: Mapping[int, int]) -> None:
        if self._group is None:
            raise ValueError(f"a consumer of {self._topic} without a group has nothing to commit to")
        with _writing(self._db):
            mine = self._share()
            self._db.executemany(
                "INSERT INTO commits VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET offset = excluded.offset",
                [(self._topic, self._group, p, o) for p, o in offsets.items() if p in mine],
            )

    def ends(self) -> dict[int, int]:
        return _ends(self._db, self._topic)

    def positions(self) -> dict[int, int]:
        return dict(self._next)

    def lag(self) -> int:
        ends = self.ends()
        return sum(ends[partition] - offset for partition, offset in self._next.items())

    def close(self) -> None:
        if self._group is not None:
            with _writing(self._db):
                self._db.execute(
                    "DELETE FROM member_leases WHERE topic = ? AND grp = ? AND member = ?",
                    (self._topic, self._group, self._member),
                )
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, limit: int) -> list[Record]:
        seen = self._data_version()
        records: list[Record] = []
        partitions = sorted(self._next)
        self._turn += 1  # each poll starts at another partition, so that no partition starves
        for i in range(len(partitions)):
            partition = partitions[(self._turn + i) % len(partitions)]
            rows = self._db.execute(
                "SELECT offset, key, headers, body FROM records "
                "WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?",
                (self._topic, partition, self._next[partition], limit - len(records)),
            ).fetchall()
            if rows and rows[0][0] != self._next[partition]:
                raise OffsetGone(
                    f"{self._topic}[{partition}]: offset {self._next[partition]} is gone, "
                    f"the log starts at {rows[0][0]}"
                )
            for offset, key, headers, body in rows:
                records.append(Record(self._topic, partition, offset, key, body, json.loads(headers)))
                self._next[partition] = offset + 1
            if len(records) == limit:
                break
        if not records:
            self._seen = seen
        return records

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._data_version() == self._seen and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def _data_version(self) -> int:
        (number,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(number)

    def _keep_membership(self) -> None:
        if self._group is None:
            return
        now = self._clock()
        if now - self._heard < self._lease_s / 3 and self._data_version() == self._seen:
            return
        if now - self._heard >= self._lease_s / 3:
            with _writing(self._db):
                self._db.execute(
                    "INSERT INTO member_leases VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT DO UPDATE SET boot = excluded.boot, heard = excluded.heard",
                    (self._topic, self._group, self._member, self._boot, now),
                )
                self._db.execute(
                    "DELETE FROM member_leases WHERE topic = ? AND grp = ? AND (boot != ? OR heard < ?)",
                    (self._topic, self._group, self._boot, now - self._lease_s),
                )
            if now - self._heard > self._lease_s:
                self._next = {}  # another member may have had the partitions meanwhile
            self._heard = now
        share = self._share()
        if share != set(self._next):
            committed = dict(
                self._db.execute(
                    "SELECT partition, offset FROM commits WHERE topic = ? AND grp = ?", (self._topic, self._group)
                ).fetchall()
            )
            bounds = _bounds(self._db, self._topic)
            self._next = {p: self._next[p] if p in self._next else int(committed.get(p, bounds[p][0])) for p in share}

    def _share(self) -> set[int]:
        members = [
            member
            for (member,) in self._db.execute(
                "SELECT member FROM member_leases WHERE topic = ? AND grp = ? AND boot = ? AND heard >= ? "
                "ORDER BY member",
                (self._topic, self._group, self._boot, self._clock() - self._lease_s),
            )
        ]
        if self._member not in members:
            return set()
        place = members.index(self._member)
        return {p for p in _ends(self._db, self._topic) if p % len(members) == place}


@contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block in a write transaction. BEGIN IMMEDIATE avoids deadlocks of lock upgrades."""
    with _on_disk(db):
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite itself ends the transaction on a full disk
                db.execute("ROLLBACK")
            raise


@contextmanager
def _on_disk(db: sqlite3.Connection) -> Iterator[None]:
    """Convert SQLite's errors of a full disk into OSError with ENOSPC."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in _FULL:
            raise
        (_, _, path) = db.execute("PRAGMA database_list").fetchone()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    with _on_disk(db):
        _use_wal(db)
        db.execute("PRAGMA synchronous = FULL")
    return db


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch the file to WAL mode. Retries, because SQLite does not wait for another process that does the same."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)
        else:
            return


def _bounds(db: sqlite3.Connection, topic: str) -> dict[int, tuple[int, int]]:
    rows = db.execute("SELECT partition, first, next FROM ends WHERE topic = ? ORDER BY partition", (topic,)).fetchall()
    if not rows:
        raise LookupError(f"topic {topic} does not exist; the run's supervisor or its learner creates it at start")
    return {partition: (first, end) for partition, first, end in rows}


def _ends(db: sqlite3.Connection, topic: str) -> dict[int, int]:
    return {partition: end for partition, (_, end) in _bounds(db, topic).items()}
