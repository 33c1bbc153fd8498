"""python -m bench peers: the embedded run beside TRL's GRPO, with the same model, tasks, rewards and batch.

Each side is a program of its own and runs alone, one after the other, for each seed. Both write one line for each
optimizer step; one observer reads the lines and the processor time of all processes of the side.

    ours    palimpsest run examples/embedded.toml: vLLM, gateway, store and learner, asynchronous
    trl     GRPOTrainer with a rollout_func on generate() of transformers (bench/peers/trl_grpo.py), in one process,
            with torch and transformers of this environment; TRL comes from the package registry into the cache

    trained_tokens_per_s_ratio   tokens of the trained batches per second of wall time, from the first step to the last
    cpu_seconds_per_step_ratio   processor seconds of all processes of a side per step, from the first step to the last
    seconds_to_success_ratio     from the beginning of the first step until the mean success of the newest 1,000
                                 trajectories is 0.8; a side that never gets there counts with its whole time
                                 (`reached`: how many runs got there)

All ratios are ours / TRL's, of the medians over the seeds. `start_s`: seconds before the first step, with imports and
the engine; no ratio has it. Ours computes in the model's bf16 with float32 masters. TRL trains float32 weights
(--precision float32), or float32 weights under bf16 autocast (--precision bf16).

--shape large: a random model of 30 M parameters, answers of up to 512 tokens, 8 tasks of 4 answers a step. It solves
nothing, so only tokens and processor time mean something.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.peers.observer import Side, observe
from bench.peers.settings import PeerSettings, read_run
from bench.peers.trl_packages import PACKAGES, folder_of_packages
from bench.rollout import enlarge

SUCCESS, NEWEST = 0.8, 1000
"""Mean success that counts as learned, and over how many of the newest trajectories."""
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Silence the remarks of TRL about versions of vLLM, which it does not use here."""
LARGE_FLAGS = (
    "--sampling.max_turn_tokens=512", "--sampling.max_trajectory_tokens=1000", "--sampling.max_turns=1",
    "--learner.groups_per_batch=8", "--tasks.samples_per_group=4", "--rollout.max_live=64",
)  # fmt: skip
"""Keys of the run that `--shape large` sets."""


def main(arguments: list[str]) -> dict[str, Any]:
    """Measure both sides. Returns the result."""
    options = argparse.ArgumentParser(
        prog="python -m bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", default="examples/embedded.toml", help="file of the run")
    options.add_argument("--steps", type=int, default=500, help="optimizer steps of each side")
    options.add_argument("--seeds", type=int, default=3, help="runs of each side")
    options.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of TRL")
    options.add_argument("--shape", choices=("example", "large"), default="example")
    options.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    known, flags = options.parse_known_args(arguments)
    packages = folder_of_packages()
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in known.sides}
    with tempfile.TemporaryDirectory(prefix="palimpsest-bench-") as folder:
        if known.shape == "large":
            base = read_run(known.run, flags)
            model = enlarge(Path(base.model), Path(folder) / "large")
            flags = [*flags, *LARGE_FLAGS, f"--model.path={model}"]
        settings = replace(read_run(known.run, flags), steps=known.steps, precision=known.precision)
        for seed, side in itertools.product(range(known.seeds), known.sides):
            home = Path(folder) / f"{side}-{seed}"
            home.mkdir()
            if side == "ours":
                observed = observe(_ours(known.run, flags, home, known.steps, seed), home / "bench" / "history.jsonl")
            else:
                observed = observe(_trl(settings, home, seed), home / "steps.jsonl", {"PYTHONPATH": packages, **QUIET})
            sides[side].append(_figures(observed))
            print(f"{side}, seed {seed}: {json.dumps(sides[side][-1])}", file=sys.stderr, flush=True)
    return {
        "name": "peers",
        "shape": known.shape,
        "steps": known.steps,
        "seeds": known.seeds,
        "precision": {"ours": "bf16, float32 masters", "trl": known.precision},
        "trl": PACKAGES[0],
        **_ratios(sides),
        "sides": sides,
        "settings": asdict(settings) | {"model": Path(settings.model).name},
    }


def _ours(run: str, flags: Sequence[str], home: Path, steps: int, seed: int) -> list[str]:
    own = ["--run.id=bench", f"--run.folder={home}", f"--run.seed={seed}", f"--learner.versions={steps}"]
    return [sys.executable, "-m", "palimpsest", "run", run, *own, *flags]


def _trl(settings: PeerSettings, home: Path, seed: int) -> list[str]:
    (home / "settings.json").write_text(json.dumps(asdict(replace(settings, seed=seed))))
    return [sys.executable, "-m", "bench.peers.trl_grpo", str(home)]


def _figures(side: Side) -> dict[str, Any]:
    """The figures of one run of one side."""
    seconds, cpu_s, steps = side.from_first_to_last()
    reached = side.seconds_to(SUCCESS, NEWEST)
    return {
        "steps": len(side.steps),
        "start_s": round(side.start_s, 1),
        "trained_tokens_per_s": round(sum(step.tokens for step in side.steps[1:]) / seconds, 1),
        "cpu_seconds_per_step": round(cpu_s / steps, 4),
        "seconds_to_success": round(side.whole_s if reached is None else reached, 1),
        "reached": reached is not None,
        "success_at_end": round(side.success(NEWEST), 4),
        "seconds": round(side.whole_s, 1),
    }


def _ratios(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ours / TRL's, of the medians; nothing if a side was not measured."""
    if len(sides) < 2:
        return {}
    names = ("trained_tokens_per_s", "cpu_seconds_per_step", "seconds_to_success")
    median = {
        side: {name: statistics.median(run[name] for run in runs) for name in names} for side, runs in sides.items()
    }
    return {
        **{f"{name}_ratio": round(median["ours"][name] / median["trl"][name], 3) for name in names},
        "reached": {side: sum(run["reached"] for run in runs) for side, runs in sides.items()},
    }
