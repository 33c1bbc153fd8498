"""The bus on Kafka: the producer, and the factory of consumers.

A record counts as published when the broker acknowledged it. The bus checks the outcome of every send and sends failed
records again, with the same bytes and therefore the same ids. An idempotent producer does not replace this: when an
outage exceeds its timeout it discards the batch, and only the caller still has the records. A record may therefore be
on the log twice, or after other records of its key from the same call. Readers deduplicate by id.
"""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaProducer, errors

from palimpsest.common import failpoints
from palimpsest.common.bus.kafka.connection import DENIED, PAUSE_S, Connection
from palimpsest.common.bus.kafka.consumer import KafkaConsumer
from palimpsest.common.bus.kafka.topics import Settings, make_topics, partition_count
from palimpsest.common.bus.port import Outgoing, Position, partition_of
from palimpsest.common.logs import logger
from palimpsest.common.outages import KAFKA

GIVE_UP_S = 20.0
"""Time for which kafka-python retries a send, in seconds. After it the bus logs the failure and sends again."""
SOON_S = 3.0
"""Time without an outcome of a send after which the availability monitor probes the brokers, in seconds."""
LEASE_S = 10.0
"""Time without a heartbeat after which a group member loses its partitions, in seconds."""
ENDING_S = 10.0
"""Time that the thread of a closed producer gets to end, in seconds."""
BATCH_BYTES = 1 << 18
OVERHEAD_BYTES = 4096
"""Space reserved for the header of a batch and of a record, in addition to key, headers and body."""


class KafkaBus:
    """See common/bus/port.py. Safe to share between the threads of a process."""

    def __init__(
        self,
        connection: Connection,
        *,
        prefix: str,
        settings: Settings | None = None,
        lease_s: float = LEASE_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self._connection, self._prefix, self._lease_s, self._give_up_s = connection, prefix, lease_s, give_up_s
        self._settings = settings or Settings()
        self._partitions: dict[str, int] = {}
        self._renewing = threading.Lock()
        self._producer = self._connect(connection.start_limit_s)

    def _connect(self, limit_s: float) -> Any:
        return self._connection.client(
            KafkaProducer,
            limit_s=limit_s,
            client_id=f"{self._prefix}producer",
            acks="all",
            enable_idempotence=True,
            allow_auto_create_topics=False,
            max_request_size=self._settings.max_record_bytes,
            batch_size=min(BATCH_BYTES, self._settings.max_record_bytes),
            delivery_timeout_ms=int(self._give_up_s * 1000),
            request_timeout_ms=int(self._give_up_s * 500),  # must be below delivery_timeout_ms
            max_block_ms=int(self._give_up_s * 1000),
            metrics_enabled=False,
        )

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        named = {self._prefix + topic: count for topic, count in partitions.items()}
        make_topics(self._connection, self._settings, named)

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if not records:
            return []
        count = self._count(topic)
        for record in records:
            self._check_size(topic, record)
        positions: dict[int, Position] = {}
        left = list(range(len(records)))
        began, outages = time.monotonic(), self._connection.outages
        with outages.waiting() as outage:
            until = outages.now() + self._connection.outage_limit_s
            while left:
                problem = self._send(topic, count, records, left, positions, until)
                left = [i for i in left if i not in positions]
                if left and failpoints.active("bus.unchecked_sends"):
                    return [positions.get(i, Position(-1, -1)) for i in range(len(records))]
                if left:
                    assert problem is not None
                    waited, why = time.monotonic() - began, self._connection.reason(problem)
                    outage.record_failure(KAFKA, self._connection.servers, why, until=until)
                    logger().warning(
                        "publish retried", topic=topic, records=len(left), waited_s=round(waited), problem=why
                    )
                    if waited > self._connection.outage_limit_s:
                        raise self._connection.outage_error(f"write to {topic}", waited, why)
                    time.sleep(PAUSE_S)
        return [positions[i] for i in range(len(records))]

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> KafkaConsumer:
        if group is None:
            self._count(topic)  # raises LookupError for a missing topic; for a group it may be created later
        return KafkaConsumer(
            self._connection, self._prefix, topic, group, member,
            partitions=lambda: self._count(topic), lease_s=self._lease_s,
        )  # fmt: skip

    def close(self) -> None:
        _close(self._producer, self._give_up_s)

    def _send(
        self,
        topic: str,
        count: int,
        records: Sequence[Outgoing],
        left: list[int],
        positions: dict[int, Position],
        until: float,
    ) -> Exception | None:
        """Send the records with the indexes `left` and wait for their outcomes. Returns the last error, if any.

        Adds the positions of acknowledged records to `positions`. `until`: end of the retries of `publish`, in Unix
        seconds.
        """
        producer, problem, sent = self._producer, None, []
        try:
            for i in left:
                record = records[i]
                sent.append(
                    producer.send(
                        self._prefix + topic,
                        key=record.key.encode(),
                        value=record.body,
                        headers=[(name, value.encode()) for name, value in record.headers.items()],
                        partition=partition_of(record.key, count),
                    )
                )
        except (errors.KafkaTimeoutError, errors.IllegalStateError) as error:
            problem = (
                error  # buffer full, no metadata in time, or closed by another thread: `publish` sends the rest again
            )
        deadline = time.monotonic() + 2 * self._give_up_s
        if not self._wait_for_outcomes(sent):
            self._connection.prober.suspect(until)
        for i, future in zip(left, sent, strict=False):
            try:
                done = future.get(timeout=max(0.0, deadline - time.monotonic()))
            except DENIED as error:
                raise self._connection.access_error(error) from None
            except errors.KafkaError as error:
                problem = error
            else:
                positions[i] = Position(done.partition, done.offset)
        if not all(future.is_done for future in sent):
            problem = errors.KafkaTimeoutError(f"no outcome in {2 * self._give_up_s:.0f} s")
            self._restart_producer(producer)
        return problem

    def _wait_for_outcomes(self, sent: "Sequence[Any]") -> bool:
        """Wait up to SOON_S. Returns whether all sends have an outcome."""
        deadline = time.monotonic() + SOON_S
        for future in sent:
            with contextlib.suppress(errors.KafkaError):
                future.get(timeout=max(0.0, deadline - time.monotonic()))
        return all(future.is_done for future in sent)

    def _restart_producer(self, stuck: Any) -> None:
        """Replace a producer that neither sends its records nor fails them.

        kafka-python 3.0.12 can reach this state after an outage: it never sends a batch that was drained when another
        batch timed out, and all later batches wait for it.
        """
        with self._renewing:
            if self._producer is stuck:
                logger().warning("producer restarted")
                _close(stuck, 0.0)  # first, because its records must not arrive after those that are sent again
                self._producer = self._connect(self._connection.outage_limit_s)

    def _count(self, topic: str) -> int:
        if topic not in self._partitions:
            self._partitions[topic] = partition_count(self._connection, topic, self._prefix + topic)
        return self._partitions[topic]

    def _check_size(self, topic: str, record: Outgoing) -> None:
        beside = len(record.key.encode()) + sum(len(n) + len(v.encode()) + 8 for n, v in record.headers.items())
        if len(record.body) + beside + OVERHEAD_BYTES > self._settings.max_record_bytes:
            raise ValueError(
                f"a record of {len(record.body)} bytes for {topic} exceeds bus.max_record_bytes "
                f"({self._settings.max_record_bytes}): send long bodies as claims (common/bus/claim_check.py)"
            )


def _close(producer: Any, timeout_s: float) -> None:
    """Close the producer. Records that are not sent after `timeout_s` seconds fail."""
    try:
        producer.close(timeout=timeout_s)
    except errors.KafkaTimeoutError:
        # kafka-python's `close` leaves the sender thread running after a timeout
        producer._sender.force_close()
        producer._sender.join(ENDING_S)
        with contextlib.suppress(errors.KafkaError):
            producer.close(timeout=0)
