"""What old log-probs cost, by each route to them: seconds, bytes, and how long workers stand still.

python -m bench routes [--parameters small|medium] [--tokens 192] [--versions 5] [--only NAME ...]

Every route has a learner of its own (a process, the real one), a real store, a real log, and simulated workers. They
train by turns, one version each, in an order that rotates: whatever else the machine does so hits all alike. The first
max_staleness + 1 versions are not counted. Shares are of the same version's own passes and step, and medians over
versions; `bypass` has no old log-probs and is the reference. `interruption_busy` is interruption with workers that are
quicker than the learner, which then never waits and scores nothing early.
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

from bench.routes.figures import figures, show, targets
from bench.routes.variant_run import FORKS, PRELOADED, Pace, VariantRun
from bench.routes.variants import CONTENDERS, REFERENCE, SHAPES, Load, build_model

GUESS_S = 1.0
"""A step, until the reference was seen to train."""


def main(arguments: list[str]) -> dict[str, Any]:
    """The figures of every route."""
    options = _options(arguments)
    load = Load(tokens=options.tokens)
    began, busy = time.monotonic(), os.getloadavg()
    names = options.only or [contender.name for contender in CONTENDERS]
    chosen = [contender for contender in CONTENDERS if contender.name == REFERENCE or contender.name in names]
    FORKS.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-bench-")))
        shape = SHAPES[options.parameters]
        parameters = build_model(shape, folder / "model")
        entrants = []
        for contender in chosen:
            entrant = VariantRun(contender, load, folder=folder, model=folder / "model", vocabulary=shape.vocabulary)
            stack.callback(entrant.kill)
            entrants.append(entrant)
        measured, weights = _race(entrants, warm_up=load.max_staleness + 1, versions=options.versions)
    routes = figures(measured, weights)
    met = targets(routes)
    show(routes, met)
    return {
        "name": "routes",
        "routes": routes,
        "targets": met,
        "parameters": parameters,
        "tokens_per_trajectory": load.tokens,
        "trajectories_per_version": load.trajectories,
        "max_staleness": load.max_staleness,
        "versions": options.versions,
        "cores": os.cpu_count(),
        "load_average": {"before": busy, "after": os.getloadavg()},
        "seconds": round(time.monotonic() - began, 1),
        "torch": version_of("torch"),
    }


def _race(
    entrants: Sequence[VariantRun], *, warm_up: int, versions: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, int]]]:
    """What was noted of every counted version, and what each learner holds in the end."""
    for entrant in entrants:
        entrant.begin()
    for entrant in entrants:
        entrant.ready()
    pace, reference = Pace(GUESS_S), entrants[0]
    for _ in range(warm_up):  # before anybody else: with workers at another pace, batches would pile up or be awaited
        pace.trained(REFERENCE, reference.turn(pace.batch_s(reference.contender)))
    measured: dict[str, list[dict[str, Any]]] = {entrant.contender.name: [] for entrant in entrants}
    for turn in range(warm_up + versions):
        first = turn % len(entrants)
        for entrant in (*entrants[first:], *entrants[:first]):
            version = entrant.turn(pace.batch_s(entrant.contender))
            pace.trained(entrant.contender.name, version)
            if turn >= warm_up:
                measured[entrant.contender.name].append(version)
        print(f"version {turn + 1} of {warm_up + versions}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    weights = {entrant.contender.name: entrant.weigh() for entrant in entrants}
    for entrant in entrants:
        entrant.end()
    return measured, weights


def _options(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m bench routes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--parameters", choices=list(SHAPES), default="small")
    options.add_argument("--tokens", type=int, default=192, help="mean length of a trajectory")
    options.add_argument("--versions", type=int, default=5, help="counted, of each route")
    names = [contender.name for contender in CONTENDERS]
    said = f"these, and the reference; of {', '.join(names)}"
    options.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=said)
    return options.parse_args(arguments)
