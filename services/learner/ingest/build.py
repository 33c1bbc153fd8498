"""Builds the learner's ingest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from palimpsest.common.bus.port import Bus
from palimpsest.common.routes import RouteShape
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.ingest.offers import OfferSettings, TaskSettings
from palimpsest.services.learner.ingest.task_publisher import TaskPublisher
from palimpsest.services.learner.ingest.trajectory_reader import EvaluationRecords, ReceivedTrajectory, TrajectoryReader


@dataclass(frozen=True, slots=True)
class Ingest:
    """The ledger and the objects that fill it."""

    ledger: TrajectoryLedger[ReceivedTrajectory]
    reader: TrajectoryReader
    tasks: TaskPublisher
    dead_letters: DeadLetterWriter
    offers: OfferSettings

    def start(
        self,
        offsets: Mapping[int, int],
        task_offsets: Mapping[int, int],
        score_offsets: Mapping[int, int],
        *,
        now: float,
    ) -> None:
        """Start from a checkpoint's offsets ({}: the start of the topic). Restore the ledger first.

        Raises UserError if the log starts after these offsets.
        """
        self.reader.start(offsets)
        self.tasks.start(task_offsets, score_offsets, now=now)

    def close(self) -> None:
        """Close the consumers."""
        self.tasks.close()
        self.reader.close()


def build_ingest(
    bus: Bus,
    ledger: TrajectoryLedger[ReceivedTrajectory],
    settings: TaskSettings,
    *,
    run: str,
    vocabulary: int,
    confirm: Callable[[], None],
    epoch: Callable[[], int],
    control: ControlCheck,
    evaluations: EvaluationRecords,
    keep_flushed: bool = False,
    on_resolved: Callable[[str], None] = lambda _: None,
    routes: RouteShape | None = None,
) -> Ingest:
    """Return the ingest around a ledger. See DeadLetterWriter for `confirm`, TaskPublisher for `epoch` and `control`,
    TrajectoryReader for the others."""
    dead_letters, offers = DeadLetterWriter(bus, run=run, confirm=confirm), OfferSettings(settings)
    return Ingest(
        ledger,
        TrajectoryReader(
            bus,
            ledger,
            dead_letters,
            run=run,
            offered=offers,
            vocabulary=vocabulary,
            evaluations=evaluations,
            keep_flushed=keep_flushed,
            on_resolved=on_resolved,
            routes=routes,
        ),
        TaskPublisher(bus, ledger, offers, run=run, confirm=confirm, epoch=epoch, control=control),
        dead_letters,
        offers,
    )
