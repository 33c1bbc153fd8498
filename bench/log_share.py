"""The share of a run that the log on Kafka takes: what another client library could give the run at most.

python -m bench log_share [--versions 60] [--run examples/embedded.toml] [--SECTION.KEY=VALUE ...]

Starts a Kafka and a run on it. Every service notes its calls of `publish` and `poll` (bench/log_calls.py). Figures are
of the time between the first and the last version that the learner published. `critical_share` is the time that the
learner's main thread, which trains, spends in `publish`, and its processor time in `poll`; a poll that waits for
records is no cost of the log. `library_share` is the processor time of the threads of kafka-python, of the whole of
the process. With a client that publishes `publish_times` and reads `consume_times` as fast (`python -m bench bus`), a
version would be at most `saved_share` shorter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.backends.kafka import Kafka

ROOT = Path(__file__).resolve().parent.parent
Lines = list[dict[str, Any]]


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of one run."""
    options = argparse.ArgumentParser(
        prog="python -m bench log_share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--versions", type=int, default=60, help="versions to train")
    options.add_argument("--run", default="examples/embedded.toml", help="file of the run")
    options.add_argument("--servers", default="", help="address of a running Kafka")
    options.add_argument("--publish-times", type=float, default=3.0, help="how much faster the other client publishes")
    options.add_argument("--consume-times", type=float, default=5.5, help="how much faster the other client reads")
    known, flags = options.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="palimpsest-bench-") as folder:
        calls = Path(folder) / "calls"
        calls.mkdir()
        if known.servers:
            _run(known, flags, Path(folder), known.servers)
        else:
            with Kafka(Path(folder) / "kafka") as kafka:
                _run(known, flags, Path(folder), kafka.servers)
        files = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(calls.iterdir())]
    figures = shares(files, publish_times=known.publish_times, consume_times=known.consume_times)
    return {"name": "log_share", **figures, "load": [round(one, 1) for one in os.getloadavg()]}


def _run(known: argparse.Namespace, flags: Sequence[str], folder: Path, servers: str) -> None:
    paths = [str(ROOT), str(ROOT / "bench" / "metered"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "BENCH_LOG_CALLS": str(folder / "calls"),
        "PYTHONPATH": os.pathsep.join(one for one in paths if one),
    }
    command = [
        sys.executable, "-m", "palimpsest", "run", known.run, "--run.id=bench", f"--run.folder={folder}",
        f"--learner.versions={known.versions}", "--bus.kind=kafka", f"--bus.servers={servers}", *flags,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=environment)


def shares(files: Sequence[Lines], *, publish_times: float, consume_times: float) -> dict[str, Any]:
    """Return the figures from the lines of each process. The learner's has the published versions."""
    (learner,) = [lines for lines in files if any(line.get("version") for line in lines)]
    versions = [line["at"] for line in learner if line.get("version")]
    first, last = versions[0], versions[-1]
    others = [lines for lines in files if lines is not learner]
    of_learner = _of(learner, first, last)
    publish_share = of_learner["main"]["publish_s"] / (last - first)
    poll_share = of_learner["main"]["poll_cpu_s"] / (last - first)
    return {
        "versions": len(versions) - 1,
        "seconds": round(last - first, 3),
        "critical_share": round(publish_share + poll_share, 5),
        "critical_publish_share": round(publish_share, 5),
        "critical_poll_share": round(poll_share, 5),
        "saved_share": round(publish_share * (1 - 1 / publish_times) + poll_share * (1 - 1 / consume_times), 5),
        "learner": of_learner,
        "others": [found for lines in others if (found := _of(lines, first, last))["calls"]],
    }


def _of(lines: Lines, first: float, last: float) -> dict[str, Any]:
    """Return the figures of one process."""
    inside = [line for line in lines if first < line["at"] <= last]
    calls = [line for line in inside if "what" in line]
    cpu = [line["cpu"] for line in inside if "what" not in line]
    process, library = ((cpu[-1][name] - cpu[0][name]) if cpu else 0.0 for name in ("process", "library"))
    return {
        "calls": len(calls),
        "published": sum(line["records"] for line in calls if line["what"] == "publish"),
        "read": sum(line["records"] for line in calls if line["what"] == "poll"),
        "bytes": sum(line["bytes"] for line in calls),
        "main": _spent([line for line in calls if line["main"]]),
        "other_threads": _spent([line for line in calls if not line["main"]]),
        "cpu_s": round(process, 3),
        "library_share": round(library / process, 4) if process else 0.0,
    }


def _spent(calls: Lines) -> dict[str, float]:
    """Return the seconds in these calls."""
    publish, poll = ([line for line in calls if line["what"] == what] for what in ("publish", "poll"))
    return {
        "publishes": len(publish),
        "publish_s": round(sum(line["wall"] for line in publish), 4),
        "publish_cpu_s": round(sum(line["cpu"] for line in publish), 4),
        "polls": len(poll),
        "poll_cpu_s": round(sum(line["cpu"] for line in poll), 4),
    }
