"""Tracks a run that is started twice; prints what the system holds: -m tests.processes.track wandb|mlflow FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

from palimpsest.services.learner.tracking.mlflow_run import MlflowRun
from palimpsest.services.learner.tracking.wandb_run import WandbRun


def wandb(folder: Path) -> Any:
    """Each start of an offline run has a folder with the id of the run; `wandb sync` joins them."""
    for kept, versions in ((0, (1, 2)), (2, (3,))):
        tracker = WandbRun(folder, project="palimpsest", run="r")
        tracker.open(kept=kept)
        for version in versions:
            tracker.log(version, {"reward": version / 4})
        tracker.close()
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[path.name, path.read_bytes().count(b"reward") > 0] for path in files]


def mlflow(folder: Path) -> Any:
    """Both starts are one run with all values."""
    from mlflow import MlflowClient

    url = f"sqlite:///{folder}/mlflow.db"
    for kept, versions in ((0, (1, 2)), (2, (3,))):
        tracker = MlflowRun(folder, url=url, project="palimpsest", run="r")
        tracker.open(kept=kept)
        for version in versions:
            tracker.log(version, {"reward": version / 4})
        tracker.close()
    client = MlflowClient(tracking_uri=url)
    (experiment,) = [one for one in client.search_experiments() if one.name == "palimpsest"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward")
    return [run.info.run_name, run.info.status, [[one.step, one.value] for one in history]]


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"wandb": wandb, "mlflow": mlflow}[kind](folder)))
