"""Builds the control of a run around its log, and its routes."""

import os
import time
from collections.abc import Iterator

from fastapi import APIRouter

from palimpsest.common import run_folder
from palimpsest.common.boot_clock import boot_id
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.messages import CONTROL, ControlChanged
from palimpsest.common.outages import OUTAGES
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.tokenizer import token_text
from palimpsest.services.learner.control.page_routes import page_routes
from palimpsest.services.learner.control.routes import control_routes
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.control.waits import waits
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.loop_status import LoopStatus
from palimpsest.services.learner.observability.page_feed import PageFeed
from palimpsest.services.learner.observability.worker_watch import WorkerWatch
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
        home=config.run.home,
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


def all_routes(
    config: RunConfig, desk: ControlDesk, control: RunControl, status: LoopStatus, feed: PageFeed, watch: WorkerWatch
) -> APIRouter:
    """Return the routes of the learner: control, and the page."""
    cuts = PROXIMAL_KINDS[config.learner.proximal.kind].cuts_workers
    router = control_routes(desk, lambda: control.current, cuts=cuts)
    router.include_router(
        page_routes(
            waits=lambda: waits(
                waiting_for=status.waiting_for,
                waited_s=status.waited_s(),
                status=status.fields(),
                workers=watch.seen.states(),
                outages=OUTAGES.ongoing(),
                now=time.monotonic(),
                unix_now=time.time(),
            ),
            points=feed.after,
            folder=config.run.home / run_folder.RECORDS,
            decode=token_text(config.model.path),
        )
    )
    return router
