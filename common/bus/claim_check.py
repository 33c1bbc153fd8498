"""Long records (claim check pattern): the object store holds the body, and the record on the log carries its digest.

A broker refuses records above its size limit, and long records slow down every reader. Small records are not changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from palimpsest.common.bus.port import Bus, Consumer, Outgoing, Position, Record

CLAIM = "claim"
"""Header of a record whose body is in the object store: blake3 of the body, hex."""
MOST_CLAIM_BYTES = 1 << 28
"""Longest body in the object store: twice a trajectory of 16 million tokens with their log-probs."""
LOST = "claim_lost"
"""Header that the reader adds to a record whose body is lost. Its value is the error text."""


class ClaimLost(LookupError):
    """Raised if the object store does not hold this body, or holds it damaged."""


class Claims(Protocol):
    """Store of record bodies. Thread-safe."""

    def put_claim(self, body: bytes) -> str:
        """Store the body durably. Returns its digest."""

    def claim(self, digest: str) -> bytes:
        """Return the body with this digest. Raises ClaimLost."""

    def close(self) -> None:
        """Close the connections."""


class ClaimCheck:
    """See common/bus/port.py: a bus for records of any length, on top of a bus with a size limit."""

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
        # store the body before the record, so that readers of the record can fetch it
        digest = self._claims.put_claim(record.body)
        return replace(record, body=b"", headers={**record.headers, CLAIM: digest})


class ClaimingConsumer:
    """See common/bus/port.py: a consumer that fetches the bodies of long records."""

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

    def positions(self) -> dict[int, int]:
        return self._consumer.positions()

    def lag(self) -> int:
        return self._consumer.lag()

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, record: Record) -> Record:
        """Return the record with its body. If the body is lost, return the record with the header LOST instead.

        The reader then dead-letters the record and continues with the next one.
        """
        if CLAIM not in record.headers or record.body:
            return record
        headers = dict(record.headers)
        try:
            body = self._claims.claim(headers[CLAIM])
        except ClaimLost as error:
            return replace(record, headers=headers | {LOST: str(error)})
        del headers[CLAIM]
        return replace(record, body=body, headers=headers)
