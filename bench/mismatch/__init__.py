"""The semantic mismatch in miniature: the effect of each reference on a toy of asynchronous training.

python -m bench mismatch [--quick] [--seeds 5] [--versions 200] [--processes 2] [--folder FOLDER]

Passive: one training with exact old log-probs, and every reference applied to its tokens. Active: each reference trains
by itself, over a cross of the two thresholds. The same seed gives every run the same start, prompts, staleness and
random numbers; intervals are over seeds. --quick: two seeds, one setting, 40 versions, only to check that the program
runs. --folder: folder for the figures (SVG) and the numbers (JSON).
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.mismatch.figures import drawings
from bench.mismatch.results import MAIN, Plan, result
from bench.mismatch.toy import Toy
from bench.mismatch.training import Finished, Observed, Run, observe, train
from palimpsest.services.learner.observability.surrogate_error import Thresholds

Job = Run | tuple[Toy, int]
"""An active run, or toy and seed of a passive run."""


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the result of the measurement."""
    options = argparse.ArgumentParser(
        prog="python -m bench mismatch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    options.add_argument("--seeds", type=int, default=None)
    options.add_argument("--versions", type=int, default=None)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--folder", type=Path, default=None)
    chosen = options.parse_args(arguments)
    seeds = (2 if chosen.quick else 5) if chosen.seeds is None else chosen.seeds
    toy = Toy(versions=(40 if chosen.quick else 200) if chosen.versions is None else chosen.versions)
    if toy.versions <= toy.window:
        options.error(f"--versions={toy.versions}: give more than {toy.window}, the window of staleness")
    full = ((1.2, 1.5, float("inf")), (0.2, 0.1, 0.4))
    bands, clips = ((MAIN[0],), (MAIN[1],)) if chosen.quick else full
    if seeds < 1 or chosen.processes < 1:
        options.error("--seeds and --processes: give 1 or more")
    began = time.monotonic()
    measured = measure(Plan(toy, tuple(range(seeds)), bands, clips), processes=chosen.processes)
    measured["seconds"] = time.monotonic() - began
    if chosen.folder is not None:
        write(measured, chosen.folder)
    return measured


def measure(plan: Plan, *, processes: int) -> dict[str, Any]:
    """Return the result of all runs of the plan."""
    passive: list[Job] = [(plan.toy, seed) for seed in plan.seeds]
    active = plan.runs()
    began, done = time.monotonic(), []
    jobs = [*passive, *active]
    for outcome in _all(jobs, processes):
        done.append(outcome)
        if len(done) % 10 == 0 or len(done) == len(jobs):
            print(f"{len(done)} of {len(jobs)} runs, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    observed = [outcome for outcome in done if isinstance(outcome, Observed)]
    finished = [outcome for outcome in done if isinstance(outcome, Finished)]
    return result(plan, observed, dict(zip(active, finished, strict=True)))


def write(measured: dict[str, Any], folder: Path) -> None:
    """Write the figures and the numbers. Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings(measured).items():
        (folder / f"{name}.svg").write_text(drawing)
    (folder / "mismatch.json").write_text(json.dumps(measured, indent=1) + "\n")


def _all(jobs: Iterable[Job], processes: int) -> Iterator[Observed | Finished]:
    """Iterate over the results of the jobs, in order."""
    if processes == 1:
        _warm()
        yield from map(_work, jobs)
        return
    # spawn, because torch may have started threads, whose state a fork would copy
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_warm) as pool:
        yield from pool.map(_work, jobs)


def _work(job: Job) -> Observed | Finished:
    if isinstance(job, Run):
        return train(job)
    toy, seed = job
    return observe(toy, Thresholds(band=MAIN[0], clip_low=MAIN[1], clip_high=MAIN[1]), seed)


def _warm() -> None:
    """Use one thread. Train once, so that the time of the first run excludes lazy imports of torch."""
    torch.set_num_threads(1)
    train(Run(Toy(versions=1), "exact", Thresholds(band=MAIN[0], clip_low=MAIN[1], clip_high=MAIN[1]), 0))
