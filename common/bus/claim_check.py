"""Long records: the body goes to the object store under its digest, the log carries the digest (claim check).

A broker refuses records beyond its limit, and a log full of long ones serves every reader badly. Small records pass
untouched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from palimpsest.common.bus.port import Bus, Consumer, Outgoing, Position, Record

CLAIM = "claim"
"""Header of a record whose body is elsewhere: blake3 of the body, hex."""
LOST = "claim_lost"
"""Header, added on reading, of one whose body is nowhere any more: why."""


class ClaimLost(LookupError):
    """The object store does not hold this body any more, or not whole."""


class Claims(Protocol):
    """A place for bodies. Its methods may be called from several threads."""

    def put_claim(self, body: bytes) -> str:
        """Store durably; the digest to fetch it by."""

    def claim(self, digest: str) -> bytes:
        """The body; raises ClaimLost."""

    def close(self) -> None:
        """Let go of connections."""


class ClaimCheck:
    """See common/bus/port.py: a bus for records of any length, over one with a limit."""

    def __init__(self, bus: Bus, claims: Claims, *, over_bytes: int) -> None:
        self._bus, self._claims, self._over_bytes = bus, claims, over_bytes

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        self._bus.create_topics(partitions)

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        return self._bus.publish(topic, [self._check_in(record) for record in records])

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> "ClaimingConsumer":
        return ClaimingConsumer(self._bus.consumer(topic, group=group, member=member), self._claims)

    def close(self) -> None:
        self._bus.close()
        self._claims.close()

    def _check_in(self, record: Outgoing) -> Outgoing:
        if len(record.body) <= self._over_bytes:
            return record
        # before the record: what is on the log can be fetched
        digest = self._claims.put_claim(record.body)
        return replace(record, body=b"", headers={**record.headers, CLAIM: digest})


class ClaimingConsumer:
    """See common/bus/port.py: a consumer that hands out whole records."""

    def __init__(self, consumer: Consumer, claims: Claims) -> None:
        self._consumer, self._claims = consumer, claims

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        return [self._fetch(record) for record in self._consumer.poll(limit=limit, timeout_s=timeout_s)]

    def assignment(self) -> frozenset[int]:
        return self._consumer.assignment()

    def seek(self, offsets: Mapping[int, int]) -> None:
        self._consumer.seek(offsets)

    def commit(self, offsets: Mapping[int, int]) -> None:
        self._consumer.commit(offsets)

    def ends(self) -> dict[int, int]:
        return self._consumer.ends()

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, record: Record) -> Record:
        """The record with its body. One whose body is lost is handed out without it, and says so: its reader buries
        it like any other that cannot be used, and the records behind it are read."""
        if CLAIM not in record.headers or record.body:
            return record
        headers = dict(record.headers)
        try:
            body = self._claims.claim(headers[CLAIM])
        except ClaimLost as lost:
            return replace(record, headers=headers | {LOST: str(lost)})
        del headers[CLAIM]
        return replace(record, body=body, headers=headers)
