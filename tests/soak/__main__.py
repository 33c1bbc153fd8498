"""python -m tests.soak [--minutes=30] [--seed=1] [--folder=FOLDER] [--minio]

Runs two workers and two learner ranks over Kafka, with a store in a folder or in MinIO, under faults, and prints one
JSON line. In the first half processes are killed too; in the second half none is, so that memory and open files of each
process can be compared from the middle to the end. `mib_by_minute` has the memory of each process over the whole run: a
process that still grows differs from one whose caches are full. Exits with 1 if the audit finds a fault, or if a
process has died.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.learner_parts.models import build
from tests.runs.cluster_run import ClusterRun
from tests.runs.run_process import scripted
from tests.servers.cluster import Cluster, cluster, log_server
from tests.soak.schedule import KILLS, OTHERS, minio_outage

SETTLE_S = 10.0
"""Time between the recovery from a fault and the next fault, in seconds."""


def main() -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--minio", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    toml = scripted(folder, build(tied=True), versions=10**6, tokens_per_s=50.0)
    with (cluster if arguments.minio else log_server)(folder / "servers") as servers:
        run = ClusterRun(servers, toml, "soak", "--rollout.attempts=100", stepped_clock=True)
        try:
            result = soak(run, minutes=arguments.minutes, seed=arguments.seed)
            result["died"] = run.services.died()
            stop(run)
            report = run.cluster.audit(run.home)
        finally:
            run.services.end()
    result |= {name: report[name] for name in ("sound", "findings", "trajectories", "dead_letters", "duplicates")}
    print(json.dumps(result))
    return 0 if report["sound"] and not result["died"] else 1


def soak(run: ClusterRun, *, minutes: float, seed: int) -> dict[str, object]:
    """Inject faults until the time is over. Returns what was done and measured."""
    rng, began = random.Random(seed), time.monotonic()
    half_s = minutes * 30
    others = (*OTHERS, minio_outage) if isinstance(run.cluster, Cluster) else OTHERS
    done, recoveries = Counter[str](), list[float]()
    run.versions(2)
    middle: dict[str, tuple[float, int]] = {}
    by_minute: dict[str, list[float]] = {}
    while (passed := time.monotonic() - began) < 2 * half_s:
        if passed > half_s and not middle:
            middle = resources(run)
        if passed >= 60 * max((len(values) for values in by_minute.values()), default=0):
            for name, (mib, _) in resources(run).items():
                by_minute.setdefault(name, []).append(mib)
        fault = rng.choice(others if passed > half_s else KILLS + others)
        fault(run, rng)
        recovering = time.monotonic()
        run.versions(2)  # the first may have been in work
        recoveries.append(time.monotonic() - recovering)
        done[fault.__name__] += 1
        print(f"{passed:.0f} s: {fault.__name__}, {recoveries[-1]:.1f} s", file=sys.stderr, flush=True)
        time.sleep(SETTLE_S)
    end = resources(run)
    return {
        "seed": seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "versions": run.trained(),
        "learners": run.learners,
        "faults": dict(done),
        "longest_recovery_s": round(max(recoveries), 1),
        "mib_by_minute": by_minute,
        "mib_and_files": {name: (middle.get(name), end[name]) for name in end},
    }


def resources(run: ClusterRun) -> dict[str, tuple[float, int]]:
    """Name of each process -> unshared memory in MiB, open files."""
    named = {f"rank {rank}": process for rank, process in enumerate(run.ranks())}
    for name in ("worker-0", "worker-1", "env_gateway", "snapshot_store"):
        named[name] = psutil.Process(run.services.process(name).pid)
    return {name: (round(p.memory_full_info().uss / 2**20, 1), p.num_fds()) for name, p in named.items()}


def stop(run: ClusterRun) -> None:
    """Let the learner end as on SIGTERM."""
    run.services.process(run.learner).send_signal(signal.SIGTERM)
    run.services.forget(run.learner)


if __name__ == "__main__":
    sys.exit(main())
