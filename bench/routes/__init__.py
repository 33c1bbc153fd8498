"""Cost of old log-probs by each route: seconds, bytes, and pauses of workers.

python -m bench routes [--parameters small|medium] [--tokens 192] [--versions 5] [--only NAME ...] [--part rows|runs]

It has two parts. `rows`: the training alone, on rows of 1, 2 and 4 versions (bench/routes/rows.py). `runs`:

Every variant has its own learner process (the real one), store, log, and simulated workers. The variants train one
version each, in turns, in a rotating order, so the load of the machine affects all of them alike. The first
max_staleness + 1 versions are not counted. Shares are relative to the passes and the step of the same version; figures
are medians over versions. `bypass` has no old log-probs and is the reference. In `interruption_busy` the workers are
faster than the learner, so the learner never waits and scores nothing early.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from bench.routes import rows
from bench.routes.figures import figures, row_targets, show, targets
from bench.routes.variant_run import FORKS, PRELOADED, Pace, VariantRun
from bench.routes.variants import REFERENCE, SHAPES, VARIANTS, Load, build_model

PARTS = ("rows", "runs")
INITIAL_STEP_S = 1.0
"""Assumed time of a step until the reference has trained a version."""


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of every variant."""
    options = _options(arguments)
    load = Load(tokens=options.tokens)
    began, load_before = time.monotonic(), os.getloadavg()
    shape, parts = SHAPES[options.parameters], options.part or list(PARTS)
    names = options.only or [variant.name for variant in VARIANTS]
    chosen = [variant for variant in VARIANTS if variant.name == REFERENCE or variant.name in names]
    FORKS.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-bench-")))
        parameters = build_model(shape, folder / "model")
        widths: dict[str, dict[str, Any]] = {}
        if "rows" in parts:
            widths = rows.measure(shape, load, folder=folder, model=folder / "model", versions=options.versions)
            rows.show(widths)
        runs = []
        chosen = chosen if "runs" in parts else []
        for variant in chosen:
            run = VariantRun(variant, load, folder=folder, model=folder / "model", vocabulary=shape.vocabulary)
            stack.callback(run.kill)
            runs.append(run)
        warm_up = load.max_staleness + 1
        measured, tensor_bytes = _measure(runs, warm_up=warm_up, versions=options.versions) if runs else ({}, {})
    routes = figures(measured, tensor_bytes) if measured else {}
    met = targets(routes) | row_targets(widths)
    show(routes, met)
    return {
        "name": "routes",
        "routes": routes,
        "rows": widths,
        "targets": met,
        "parameters": parameters,
        "tokens_per_trajectory": load.tokens,
        "trajectories_per_version": load.trajectories,
        "max_staleness": load.max_staleness,
        "versions": options.versions,
        "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "seconds": round(time.monotonic() - began, 1),
        "torch": version_of("torch"),
    }


def _measure(
    runs: Sequence[VariantRun], *, warm_up: int, versions: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, int]]]:
    """Return the measurements of every counted version, and the tensor bytes of each learner at the end, by variant."""
    for run in runs:
        run.begin()
    for run in runs:
        run.ready()
    pace, reference = Pace(INITIAL_STEP_S), runs[0]
    # The reference trains first: with workers at a wrong pace, the others would collect or await batches.
    for _ in range(warm_up):
        pace.trained(REFERENCE, reference.turn(pace.batch_s(reference.variant)))
    measured: dict[str, list[dict[str, Any]]] = {run.variant.name: [] for run in runs}
    for turn in range(warm_up + versions):
        first = turn % len(runs)
        for run in (*runs[first:], *runs[:first]):
            version = run.turn(pace.batch_s(run.variant))
            pace.trained(run.variant.name, version)
            if turn >= warm_up:
                measured[run.variant.name].append(version)
        print(f"version {turn + 1} of {warm_up + versions}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    tensor_bytes = {run.variant.name: run.tensor_bytes() for run in runs}
    for run in runs:
        run.end()
    return measured, tensor_bytes


def _options(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m bench routes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--parameters", choices=list(SHAPES), default="small", help="size of the model")
    options.add_argument("--tokens", type=int, default=192, help="mean length of a trajectory")
    options.add_argument("--versions", type=int, default=5, help="counted versions of each variant")
    names = [variant.name for variant in VARIANTS]
    only = f"measure only these variants and the reference; one or more of {', '.join(names)}"
    options.add_argument("--part", nargs="+", choices=PARTS, help="only these parts")
    options.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=only)
    return options.parse_args(arguments)
