"""Counts the records that a learner reads."""

import time
from array import array
from types import TracebackType
from typing import Self

from bench.simulated_streams import SENT
from palimpsest.common.bus.port import Bus, Consumer, Record
from palimpsest.common.messages import TRAJECTORIES


class Meter:
    """Number, bytes and ages of the records read from the topic `trajectories`."""

    def __init__(self) -> None:
        self.records = self.bytes = 0
        self.ages = array("f")
        """Seconds from publishing to reading, one value per record."""

    def read(self, records: list[Record]) -> None:
        """Count these records."""
        now = time.time()
        self.records += len(records)
        self.bytes += sum(len(record.body) for record in records)
        self.ages.extend(now - float(record.headers[SENT]) for record in records)


class Metered:
    """A bus (common/bus/port.py) that counts the records read from `trajectories`."""

    def __init__(self, bus: Bus, meter: Meter) -> None:
        self._bus, self._meter = bus, meter
        self.create_topics, self.publish, self.close = bus.create_topics, bus.publish, bus.close

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> Consumer:
        """See common/bus/port.py."""
        consumer = self._bus.consumer(topic, group=group, member=member)
        return _Counted(consumer, self._meter) if topic == TRAJECTORIES else consumer


class _Counted:
    """A consumer that counts its records."""

    def __init__(self, consumer: Consumer, meter: Meter) -> None:
        self._consumer, self._meter = consumer, meter
        self.assignment, self.ends, self.lag = consumer.assignment, consumer.ends, consumer.lag
        self.positions = consumer.positions
        self.seek, self.commit, self.close = consumer.seek, consumer.commit, consumer.close

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        """See common/bus/port.py."""
        records = self._consumer.poll(limit=limit, timeout_s=timeout_s)
        self._meter.read(records)
        return records

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
