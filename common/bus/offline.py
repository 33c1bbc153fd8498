"""Read an existing log from outside the run. No topics are created, and every existing record is read once."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

from palimpsest.common.bus.claim_check import Claims
from palimpsest.common.bus.factory import connect
from palimpsest.common.bus.port import Bus, OffsetGone, Record
from palimpsest.common.bus.sqlite_damage import damage_as_user_error, refuse_other_file
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import TOPICS
from palimpsest.common.user_error import ExitCode, UserError

READ_RECORDS = 1024
SILENT_S = 60.0
"""Time to wait for an existing record before reading fails, in seconds."""


def open_existing_bus(config: RunConfig, claims: Claims | None = None) -> Bus:
    """Open the log of an existing run; see `connect`. Raises UserError if the log does not exist or is damaged."""
    if config.bus.kind == "sqlite" and not config.bus_path.is_file():
        raise UserError(
            f"{config.bus_path}: no such log; name the run file of the run (runs/ID/run.toml), or set --run.id and "
            f"--run.folder"
        )
    if config.bus.kind == "sqlite":
        refuse_other_file(config.bus_path)
    with damage_as_user_error(str(config.bus_path)), ExitStack() as unless_opened:
        bus = connect(config, claims)
        unless_opened.callback(bus.close)
        try:
            for topic in TOPICS:
                with bus.consumer(topic):
                    pass
        except LookupError as error:
            raise UserError(f"run {config.run.id} has no log: {error}. Check run.id and bus.servers") from None
        unless_opened.pop_all()
    return bus


def read_existing(bus: Bus, topic: str, start: Mapping[int, int] | None = None) -> Iterator[Record]:
    """Iterate over the records that are on the topic at the time of the call.

    `start`: partition -> first offset to read. Reading starts at the first record of the log in all other partitions,
    and in partitions whose offset is gone.
    """
    with damage_as_user_error(f"topic {topic} (bus.path)"), bus.consumer(topic) as consumer:
        ends, begun = consumer.ends(), start or {}
        for partition, offset in begun.items():
            _seek_if_present(consumer.seek, partition, offset)
        with bus.consumer(topic) as probe:
            left = {p for p, end in ends.items() if begun.get(p, 0) < end and _seek_if_present(probe.seek, p, end - 1)}
        last_answer = time.monotonic()
        while left:
            records, before = consumer.poll(limit=READ_RECORDS, timeout_s=1.0), left
            left = {p for p in left if consumer.positions()[p] < ends[p]}
            if records or left != before:
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer > SILENT_S:
                raise UserError(
                    f"{topic}: the log ends at {ends}, but no record arrived for {SILENT_S:.0f} s: check the log",
                    ExitCode.UNAVAILABLE,
                )
            for record in records:
                if record.offset < ends[record.partition]:
                    yield record


def _seek_if_present(seek: Callable[[Mapping[int, int]], None], partition: int, offset: int) -> bool:
    """Seek to the offset. Returns False if the offset is not on the log."""
    try:
        seek({partition: offset})
    except OffsetGone:
        return False
    return True
