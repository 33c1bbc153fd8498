"""Names of the files in a run's folder, `runs/ID`. Pure.

The functions take the run's folder and return a path. They create no files.
"""

from pathlib import Path

RUN_FILE = "run.toml"
"""The resolved configuration, which every service reads."""
LOCK = "lock"
"""Lock file that the supervisor holds while it runs."""
ADDRESSES = "addresses.json"
"""Addresses of the services, by name, while `palimpsest run` runs."""
HISTORY = "history.jsonl"
"""One line per trained version."""
EVALUATIONS = "evaluations.jsonl"
"""One line per evaluation."""
SUMMARY = "summary.json"
REPORT = "report.html"
SECONDS = "seconds.json"
"""Wall-clock seconds, summed over all starts of the run."""
RESUMED_SETTINGS = "resumed_settings.json"
"""Settings that the command line of a resumed run states, until the learner has applied them."""
BUS = "bus.sqlite"
"""Default file of the SQLite log (`bus.path`)."""
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"
TRACKING = "tracking"
"""Files of the tracking system (`tracking.kind`)."""
RECORDS = "records"
"""Recorded batches, one file per version (`learner.record`)."""


def log_file(home: Path, process: str) -> Path:
    """Return the file with the stdout and stderr of a process."""
    return home / "logs" / f"{process}.log"


def engine_log_file(home: Path, worker: str) -> Path:
    """Return the file in which the processes of a worker's inference engine write their failures."""
    return home / "logs" / f"{worker}.engine.log"


def refusal_file(home: Path, process: str) -> Path:
    """Return the file with the error that ended a process, for its supervisor."""
    return home / "refusals" / f"{process}.json"


def cache_folder(home: Path, owner: str) -> Path:
    """Return the scratch folder of one process. It is removed with the run."""
    return home / "cache" / owner


def objects_folder(home: Path, node: str = "") -> Path:
    """Return the folder of the downloads that processes of one machine share (common/snapshots/shared_objects.py).

    node: the number of a node whose ranks share with no other process of the run; "": all processes share.
    """
    return cache_folder(home, f"objects-{node}" if node else "objects")
