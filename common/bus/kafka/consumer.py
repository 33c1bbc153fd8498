"""Consumer of one topic, alone or as a member of a group.

The consumer returns fetched records in turn from each partition, so that a full partition does not starve the others.
`auto_offset_reset` is off, so that an offset that is gone is an error. A group without a commit starts at the first
record.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from kafka import ConsumerRebalanceListener, KafkaConsumer as Client, TopicPartition, errors
from kafka.structs import MemberState, OffsetAndMetadata

from palimpsest.common.bus.kafka import batches
from palimpsest.common.bus.kafka.connection import DENIED, Connection
from palimpsest.common.bus.kafka.topics import topic_option
from palimpsest.common.bus.port import OffsetGone, Record
from palimpsest.common.logs import logger

FETCH_RECORDS = 500
FEW_RECORDS = 64
"""Number of buffered records below which the consumer fetches more."""
IDLE_LIMIT_S = 120.0
"""Time without a poll after which a live member loses its partitions, in seconds."""
STUCK_S = IDLE_LIMIT_S + 30.0
"""Maximum duration of a rebalance, in seconds. The slowest member has left the group by then."""
QUIET_S = 5.0
"""Time without an answer of the broker after which the monitor probes it, in seconds."""
POLICY_S = 60.0
"""Time for which the cleanup policy of a topic counts as known, in seconds."""
HEARTBEATS = 3.3
"""Heartbeats per lease."""


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Records that a rebalance happened. The thread of the client calls it."""

    def __init__(self) -> None:
        self.rebalanced = False
        self.lost: set[int] = set()
        """Partitions that another member may have had meanwhile."""

    def on_partitions_revoked(self, _revoked: Any) -> None:
        """Keep the partitions in `assignment` until the new assignment is known."""

    def on_partitions_lost(self, lost: Any) -> None:
        self.lost |= {tp.partition for tp in lost}

    def on_partitions_assigned(self, _assigned: Any) -> None:
        self.rebalanced = True


class KafkaConsumer:
    """See common/bus/port.py. Belongs to one thread at a time."""

    def __init__(
        self,
        connection: Connection,
        prefix: str,
        topic: str,
        group: str | None,
        member: str,
        *,
        partitions: Callable[[], int],
        lease_s: float,
    ) -> None:
        if group is not None and not member:
            raise ValueError(f"a consumer of group {group} needs a member name")
        self._connection, self._topic, self._group = connection, topic, group
        self._named = prefix + topic
        self._waiting: dict[int, deque[Any]] = {}
        """Partition -> records fetched and not yet returned."""
        self._next: dict[int, int] = {}
        """Partition -> offset of the next record to return."""
        self._turn = 0
        self._partitions = partitions
        self._listener = _Listener()
        self._stuck_s = STUCK_S
        self._policy_known_until = float("-inf")
        self._subscribed = False
        self._stable_at = time.monotonic()
        self._membership = self._group_settings(prefix, lease_s)
        self._client_id = f"{prefix}{member or 'reader'}"
        batches.install()
        self._client: Any = self._connect(connection.start_limit_s)
        if group is None:
            self._client.assign(self._all_partitions())
            self._start_at(dict(self._first_offsets()))

    def _group_settings(self, prefix: str, lease_s: float) -> dict[str, Any]:
        """Return the settings of the client for a member of the group."""
        if self._group is None:
            return {}
        return {
            "group_id": prefix + self._group,
            "session_timeout_ms": int(lease_s * 1000),
            "heartbeat_interval_ms": int(lease_s * 1000 / HEARTBEATS),
            "max_poll_interval_ms": int(max(lease_s, min(IDLE_LIMIT_S, 12 * lease_s)) * 1000),
        }

    def _connect(self, limit_s: float) -> Any:
        return self._connection.client(
            Client,
            limit_s=limit_s,
            client_id=self._client_id,
            auto_offset_reset="none",
            enable_auto_commit=False,
            allow_auto_create_topics=False,
            metrics_enabled=False,
            **self._membership,
        )

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        deadline = time.monotonic() + timeout_s
        while True:
            buffered = sum(map(len, self._waiting.values()))
            if buffered < max(limit, FEW_RECORDS):
                self._fetch(0.0 if limit == 0 or buffered else max(0.0, deadline - time.monotonic()))
            elif self._group is not None:
                self._keep_membership()
            if limit and (records := self._take_records(limit)):
                return records
            if self._is_silent():
                self._connection.prober.suspect()
            if time.monotonic() >= deadline:
                return []

    def assignment(self) -> frozenset[int]:
        return frozenset(self._next)

    def seek(self, offsets: Mapping[int, int]) -> None:
        if not offsets:
            return
        firsts, ends = self._first_offsets(), self.ends()
        for partition, offset in offsets.items():
            if partition not in ends:
                raise OffsetGone(f"{self._topic} has no partition {partition}: the log belongs to another run")
            if not firsts[partition] <= offset <= ends[partition]:
                raise OffsetGone(
                    f"{self._topic}[{partition}] holds offsets {firsts[partition]} to {ends[partition]}, not {offset}: "
                    f"the log was truncated or belongs to another run"
                )
        self._start_at(offsets)

    def commit(self, offsets: Mapping[int, int]) -> None:
        if self._group is None:
            raise ValueError(f"a consumer of {self._topic} without a group has nothing to commit to")
        mine = {
            TopicPartition(self._named, p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items() if p in self._next
        }
        if not mine:
            return
        try:
            self._connection.retry_until_answered(
                lambda: self._client.commit(mine, timeout_ms=10_000), doing=f"commit to {self._topic}"
            )
        except (errors.CommitFailedError, errors.RebalanceInProgressError, errors.UnknownMemberIdError,
                errors.IllegalGenerationError) as error:  # fmt: skip
            # another member has the partitions now, or gets them soon, and reads from the last commit
            logger().debug("commit skipped", topic=self._topic, reason=type(error).__name__)

    def ends(self) -> dict[int, int]:
        tps = self._all_partitions()
        found = self._connection.retry_until_answered(
            lambda: self._client.end_offsets(tps), doing=f"read the offsets of {self._topic}"
        )
        return {tp.partition: offset for tp, offset in sorted(found.items())}

    def positions(self) -> dict[int, int]:
        return dict(self._next)

    def lag(self) -> int:
        assigned = {tp.partition: tp for tp in self._client.assignment()}  # in a rebalance not all of self._next
        ends = {p: self._client.highwater(tp) for p, tp in assigned.items() if p in self._next}
        return sum(max(0, end - self._next[p]) for p, end in ends.items() if end is not None)

    def close(self) -> None:
        self._client.close(autocommit=False, timeout_ms=5_000)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, timeout_s: float) -> None:
        """Poll the client once: keep the membership, adopt a new assignment, buffer records."""
        if self._group is not None:
            self._join()
        try:
            fetched = self._client.poll(timeout_ms=int(timeout_s * 1000), max_records=FETCH_RECORDS)
        except errors.NoOffsetForPartitionError:
            fetched = {}  # the group has no commit for these partitions
        except errors.OffsetOutOfRangeError as error:
            ((tp, offset),) = list(error.args[0].items())[:1]
            raise OffsetGone(
                f"{self._topic}[{tp.partition}]: offset {offset} is gone, the log starts at "
                f"{self._first_offsets()[tp.partition]}"
            ) from None
        except errors.LogTruncationError as error:
            raise OffsetGone(f"{self._topic}: the broker lost records that were already read: {error}") from None
        except DENIED as error:
            raise self._connection.access_error(error) from None
        except errors.RetriableError as error:
            logger().debug("nothing to fetch", topic=self._topic, reason=f"{type(error).__name__}: {error}")
            fetched = {}
        if self._listener.rebalanced:
            self._adopt_assignment()  # the client lost its positions, so the fetched records have arbitrary offsets
            return
        for tp, records in fetched.items():
            self._waiting.setdefault(tp.partition, deque()).extend(records)
        self._pass_markers()

    def _pass_markers(self) -> None:
        """Pass over offsets that the client has read and that hold no record, where all records were returned."""
        for tp, state in list(self._client._subscription.assignment.items()):
            if tp.partition in self._next and tp.partition not in self._waiting and state.position is not None:
                self._next[tp.partition] = max(self._next[tp.partition], state.position.offset)

    def _is_silent(self) -> bool:
        """Whether no broker is connected, or none answered for QUIET_S. A broker answers a fetch within half a second.

        kafka-python has no public interface for this: a poll without a broker returns no records and no error.
        """
        connections = list(self._client._manager._conns.values())  # a copy: another thread opens and closes them
        last_read = max((getattr(one.transport, "last_read", 0.0) for one in connections if one.connected), default=0.0)
        return time.monotonic() - last_read > QUIET_S

    def _keep_membership(self) -> None:
        """Poll without fetching records."""
        self._client.pause(*self._client.assignment())
        self._fetch(0.0)
        self._client.resume(*self._client.paused())

    def _join(self) -> None:
        """Subscribe once. Replace the client if it is stuck in a rebalance.

        kafka-python 3.0.12 waits forever if it learns of the partitions of the topic while it joins. Therefore this
        method reads the metadata of the topic first, and replaces a client that does not become stable in time.
        """
        if not self._subscribed:
            self._all_partitions()
            self._client.subscribe([self._named], listener=self._listener)
            self._connection.retry_until_answered(self._client.topics, doing=f"read the metadata of {self._topic}")
            self._subscribed, self._stable_at = True, time.monotonic()
        elif self._client.group_metadata().state == MemberState.STABLE:
            self._stable_at = time.monotonic()
        elif time.monotonic() - self._stable_at > self._stuck_s:
            logger().warning("consumer rejoined group", topic=self._topic, group=self._group)
            self._listener.lost |= set(self._next)
            self._client.close(autocommit=False, timeout_ms=5_000)
            self._client, self._subscribed = self._connect(self._connection.outage_limit_s), False
            self._join()

    def _adopt_assignment(self) -> None:
        self._listener.rebalanced = False
        share = {tp.partition for tp in self._client.assignment()}
        for partition in set(self._next) & self._listener.lost | set(self._next) - share:
            del self._next[partition]
            self._waiting.pop(partition, None)
        self._listener.lost.clear()
        positions = dict(self._next)
        if new := share - set(self._next):
            firsts = self._first_offsets()
            for partition in new:
                committed = self._committed_offset(partition)
                positions[partition] = firsts[partition] if committed is None else committed
        self._start_at(positions)

    def _committed_offset(self, partition: int) -> int | None:
        tp = TopicPartition(self._named, partition)
        committed: int | None = self._connection.retry_until_answered(
            lambda: self._client.committed(tp, timeout_ms=10_000), doing=f"read the commits of {self._topic}"
        )
        return committed

    def _start_at(self, offsets: Mapping[int, int]) -> None:
        for partition, offset in offsets.items():
            self._client.seek(TopicPartition(self._named, partition), offset)
            self._waiting.pop(partition, None)
            self._next[partition] = offset

    def _take_records(self, limit: int) -> list[Record]:
        records: list[Record] = []
        self._turn += 1
        partitions = sorted(self._waiting)
        for i in range(len(partitions)):
            partition = partitions[(self._turn + i) % len(partitions)]
            waiting = self._waiting[partition]
            while waiting and len(records) < limit:
                records.append(self._record(partition, waiting.popleft()))
            if not waiting:
                del self._waiting[partition]
        return records

    def _record(self, partition: int, fetched: Any) -> Record:
        if fetched.offset > self._next[partition]:
            self._refuse_removed_records(partition, fetched.offset)
        elif fetched.offset < self._next[partition]:
            raise OffsetGone(f"{self._topic}[{partition}]: offset {fetched.offset} was returned twice")
        self._next[partition] = fetched.offset + 1
        headers = {name: (value or b"").decode(errors="replace") for name, value in fetched.headers or ()}
        key = (fetched.key or b"").decode(errors="replace")  # other programs may write to a topic
        return Record(self._topic, partition, fetched.offset, key, fetched.value or b"", headers)

    def _refuse_removed_records(self, partition: int, following: int) -> None:
        """Raise OffsetGone if the offsets before `following` may have held records.

        A gap is the end of a transaction, which holds no record, unless the log starts after it, or unless the topic is
        compacted because its cleanup.policy was changed after the start.
        """
        expected = self._next[partition]
        gone = f"{self._topic}[{partition}]: offset {expected} is gone, the next record has offset {following}"
        if self._first_offsets()[partition] > expected:
            raise OffsetGone(gone)  # the client asks for one offset after the other, so it should not come to this
        if time.monotonic() < self._policy_known_until:
            return
        policy = topic_option(self._connection, self._named, "cleanup.policy")
        if "compact" in policy:
            raise OffsetGone(
                f"{gone}: cleanup.policy of {self._named} is {policy}, and compaction removes records. Set it to "
                f"delete: kafka-configs.sh --bootstrap-server {self._connection.servers} --alter --entity-type topics "
                f"--entity-name {self._named} --add-config cleanup.policy=delete"
            )
        self._policy_known_until = time.monotonic() + POLICY_S

    def _all_partitions(self) -> list[TopicPartition]:
        """Return every partition of the topic. Raises LookupError if the topic does not exist."""
        return [TopicPartition(self._named, p) for p in range(self._partitions())]

    def _first_offsets(self) -> dict[int, int]:
        tps = self._all_partitions()
        found = self._connection.retry_until_answered(
            lambda: self._client.beginning_offsets(tps), doing=f"read the offsets of {self._topic}"
        )
        return {tp.partition: offset for tp, offset in found.items()}
