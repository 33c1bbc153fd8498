"""Builds the control of a run around its log."""

import os
from collections.abc import Iterator

from palimpsest.common.boot_clock import boot_id
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.messages import CONTROL, ControlChanged
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.publishing.publisher import Publisher


def build_control(
    config: RunConfig, bus: Bus, store: SnapshotClient, publisher: Publisher, writer: Writer
) -> tuple[ControlDesk, RunControl]:
    """Return the queue of changes and the control that applies them."""
    desk = ControlDesk(f"{boot_id()[:8]}-{os.getpid()}-")
    return desk, RunControl(
        config,
        desk,
        publish=publisher.record_change,
        earlier=lambda: recorded_changes(bus, config.run.id, ControlCheck(store)),
        writer=lambda: writer.epoch,
    )


def recorded_changes(bus: Bus, run: str, control: ControlCheck) -> Iterator[ControlChanged]:
    """Yield the changes that learners of this run put on the log while the run belonged to them."""
    for record in read_existing(bus, CONTROL):
        try:
            message = decode_for_run(record, run)
            if control.check(message, history=True) and isinstance(message, ControlChanged):
                yield message
        except RejectedRecord:
            continue  # a worker that reads it dead-letters it
