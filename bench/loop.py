"""A complete run on one machine: examples/embedded.toml for some versions. The figures come from the run's summary.

python -m bench loop [--versions 60] [--run examples/embedded.toml] [--SECTION.KEY=VALUE ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEYS = (
    "learner_wait_share",
    "rollout_wait_share",
    "update_pause_ms_p50",
    "log_bytes_per_token",
    "max_staleness_seen",
    "multi_version_trajectories",
    "phases",
    "seconds",
    "engine",
)


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of one run."""
    options = argparse.ArgumentParser(
        prog="python -m bench loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--versions", type=int, default=60, help="versions to train")
    options.add_argument("--run", default="examples/embedded.toml", help="file of the run")
    known, flags = options.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="palimpsest-bench-") as folder:
        command = [
            sys.executable, "-m", "palimpsest", "run", known.run, "--run.id=bench", f"--run.folder={folder}",
            f"--learner.versions={known.versions}", *flags,
        ]  # fmt: skip
        print("running:", " ".join(command[1:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        summary = json.loads((Path(folder) / "bench" / "summary.json").read_text())
    return {
        "name": "loop",
        "versions": summary["versions"],
        "rollout_tokens_per_s": summary["tokens_per_second"]["rollout"],
        "learner_tokens_per_s": summary["tokens_per_second"]["learner"],
        **{key: summary[key] for key in KEYS},
    }
