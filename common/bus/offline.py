"""A log as it stands, for those who look at a run from outside: nothing is made, everything there is is read once."""

import time
from collections.abc import Callable, Iterator, Mapping

from palimpsest.common.bus.claim_check import Claims
from palimpsest.common.bus.factory import connect
from palimpsest.common.bus.port import Bus, OffsetGone, Record
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import TOPICS
from palimpsest.common.user_error import ExitCode, UserError

READ_RECORDS = 1024
SILENT_S = 60.0
"""A record that is there and does not come for so long will not come."""


def open_existing_bus(config: RunConfig, claims: Claims | None = None) -> Bus:
    """The log of a run that has begun; see `connect`. Raises UserError when there is none."""
    if config.bus.kind == "sqlite" and not config.bus_path.is_file():
        raise UserError(
            f"{config.bus_path}: no such log; name the run that is meant by its run.toml (runs/ID/run.toml), or by "
            f"--run.id and --run.folder"
        )
    bus = connect(config, claims)
    try:
        for topic in TOPICS:
            with bus.consumer(topic):
                pass
    except LookupError as error:
        bus.close()
        raise UserError(f"run {config.run.id} has no log yet, or another one is meant: {error}") from None
    return bus


def read_existing(bus: Bus, topic: str, start: Mapping[int, int] | None = None) -> Iterator[Record]:
    """Every record that stands on the topic when this begins.

    `start`: partition -> offset to begin at. Where the log has moved on, and in other partitions, its first record is
    the first one.
    """
    with bus.consumer(topic) as consumer:
        ends, begun = consumer.ends(), start or {}
        for partition, offset in begun.items():
            _seek_if_present(consumer.seek, partition, offset)
        with bus.consumer(topic) as probe:
            left = {p for p, end in ends.items() if begun.get(p, 0) < end and _seek_if_present(probe.seek, p, end - 1)}
        heard = time.monotonic()
        while left:
            records = consumer.poll(limit=READ_RECORDS, timeout_s=1.0)
            if records:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENT_S:
                raise UserError(
                    f"{topic}: records up to {ends} stand there, but none came for {SILENT_S:.0f} s: is the log well?",
                    ExitCode.UNAVAILABLE,
                )
            for record in records:
                if record.offset < ends[record.partition]:
                    yield record
                if record.offset + 1 >= ends[record.partition]:
                    left.discard(record.partition)


def _seek_if_present(seek: Callable[[Mapping[int, int]], None], partition: int, offset: int) -> bool:
    """Whether the offset is on the log."""
    try:
        seek({partition: offset})
    except OffsetGone:
        return False
    return True
