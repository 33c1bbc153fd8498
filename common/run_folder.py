"""The files of a run's folder, `runs/ID`: every name once. Pure.

Functions take the run's folder and return a path; none creates anything.
"""

from pathlib import Path

RUN_FILE = "run.toml"
"""The resolved configuration, which every service reads."""
LOCK = "lock"
"""Held by the supervisor for as long as it lives."""
HISTORY = "history.jsonl"
"""One line for each version trained."""
SUMMARY = "summary.json"
REPORT = "report.html"
SECONDS = "seconds.json"
"""Wall-clock seconds over all starts of the run."""
BUS = "bus.sqlite"
"""The log, unless it is on Kafka or `bus.path` names another file."""
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"
RECORDS = "records"
"""Dumped batches, one file for each version (`learner.record`)."""


def log_file(home: Path, process: str) -> Path:
    """What a process writes to stdout and stderr."""
    return home / "logs" / f"{process}.log"


def engine_log_file(home: Path, worker: str) -> Path:
    """What the processes of a worker's inference engine write when they fail."""
    return home / "logs" / f"{worker}.engine.log"


def refusal_file(home: Path, process: str) -> Path:
    """The error with which a process ended, for its supervisor."""
    return home / "refusals" / f"{process}.json"


def cache_folder(home: Path, owner: str) -> Path:
    """Scratch space of one process; nothing in it outlives the run."""
    return home / "cache" / owner
