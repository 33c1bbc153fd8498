"""Builds the evaluator of a run."""

from collections.abc import Sequence

from palimpsest.common import run_folder
from palimpsest.common.bus.port import Bus
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import Sampling
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.evaluation.pins import EvaluationPins
from palimpsest.services.learner.evaluation.settings import evaluation_settings
from palimpsest.services.learner.observability.history import History, HistoryFollower


def build_evaluator(
    config: RunConfig,
    sampling: Sampling,
    bus: Bus,
    store: SnapshotClient,
    writer: Writer,
    followers: Sequence[HistoryFollower] = (),
) -> Evaluator:
    """Return the evaluator. sampling: of the training. followers: get the line of each evaluation."""
    return Evaluator(
        evaluation_settings(config, sampling, cuts_workers=PROXIMAL_KINDS[config.learner.proximal.kind].cuts_workers),
        bus,
        EvaluationPins(store),
        run=config.run.id,
        confirm=writer.confirm,
        epoch=lambda: writer.epoch,
        open_file=lambda length: History(config.run.home / run_folder.EVALUATIONS, length=length, followers=followers),
    )
