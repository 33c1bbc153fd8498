"""Builds the tracker of a run."""

from importlib.util import find_spec

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.tracking.event_files import EventFiles
from palimpsest.services.learner.tracking.mlflow_run import MlflowRun
from palimpsest.services.learner.tracking.port import Tracker
from palimpsest.services.learner.tracking.queue import TrackingQueue
from palimpsest.services.learner.tracking.wandb_run import WandbRun


def build_tracking(config: RunConfig) -> TrackingQueue:
    """Return the queue of the run's tracker. Raises UserError if its package is missing."""
    tracking, run = config.tracking, config.run
    if tracking.kind == "none":
        return TrackingQueue(None)
    if find_spec(tracking.kind) is None:
        raise UserError(
            f"tracking.kind: {tracking.kind} needs a package of this name, which is not installed: "
            f"pip install 'palimpsest[{tracking.kind}]' (`palimpsest doctor` has the command of a checkout)",
            ExitCode.UNAVAILABLE,
        )
    folder = run.home / run_folder.TRACKING
    tracker: Tracker
    match tracking.kind:
        case "tensorboard":
            tracker = EventFiles(folder)
        case "wandb":
            tracker = WandbRun(folder, project=tracking.project, run=run.id)
        case "mlflow":
            tracker = MlflowRun(folder, url=tracking.url, project=tracking.project, run=run.id)
    return TrackingQueue(tracker)
