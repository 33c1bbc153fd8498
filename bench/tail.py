"""Lognormal tool times in virtual time: tokens lost and trajectories dropped, by the rule that chooses batches.

python -m bench tail [--versions 400] [--seed 0]

former   oldest complete groups first; a trajectory is dropped if its first token is too old
masked   oldest complete groups first; tokens that are too old are masked (learner.max_overtaking = "unlimited")
bounded  masked, and at most 16 batches of younger groups overtake a group (learner.max_overtaking)
strict   masked, and no group overtakes another (learner.max_overtaking = 0)

learner_bound: training takes longer than sampling, with full and with adaptive admission (learner.admission)
"""

import argparse
from dataclasses import replace
from typing import Any

from bench.simulated_tail import Load, Rule, dropped_share, figures, simulate

DEFAULT = Load()
STALENESSES = range(3, 17)
EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Lower edges of the bins of durations, in medians."""
TRAIN = (1.0, 2.0, 4.0)
"""Training times of a version, in median durations."""
BOUNDED = 16
"""Batches of younger groups that may overtake a group."""


def rules(load: Load) -> dict[str, Rule]:
    """The compared rules."""
    return {
        "former": Rule(None, whole=True),
        "masked": Rule(None),
        "bounded": Rule(BOUNDED * load.groups_per_batch),
        "strict": Rule(0),
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of every rule, and the drops by duration and max_staleness."""
    options = argparse.ArgumentParser(
        prog="python -m bench tail", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--versions", type=int, default=DEFAULT.versions)
    options.add_argument("--seed", type=int, default=DEFAULT.seed)
    chosen = options.parse_args(arguments)
    load = Load(versions=chosen.versions, seed=chosen.seed)
    unequal = Load(versions=chosen.versions, seed=chosen.seed, sibling_sigma=0.3)
    return {
        "name": "tail",
        "rules": {name: figures(simulate(load, rule)) for name, rule in rules(load).items()},
        "unequal_siblings": {name: figures(simulate(unequal, rule)) for name, rule in rules(unequal).items()},
        "learner_bound": {
            str(train): {
                name: figures(simulate(replace(load, train=train), Rule(None, adaptive=name == "adaptive")))
                for name in ("full", "adaptive")
            }
            for train in TRAIN
        },
        "by_max_staleness": [_drops(bound, chosen.versions, chosen.seed) for bound in STALENESSES],
    }


def _drops(bound: int, versions: int, seed: int) -> dict[str, Any]:
    """Return the dropped shares by duration, with workers that hold four batches, and the longest duration at which any
    order of training keeps all tokens: (max_staleness + 1) / versions per median duration."""
    batch = DEFAULT.groups_per_batch
    load = Load(max_staleness=bound, versions=versions, seed=seed, capacity=4 * batch * DEFAULT.samples)
    row: dict[str, Any] = {"max_staleness": bound, "durations_from": EDGES}
    for name in ("former", "masked"):
        outcome = simulate(load, rules(load)[name])
        bins: list[list[Any]] = [[] for _ in EDGES]
        for one in outcome.resolved:
            bins[sum(one.duration >= edge for edge in EDGES) - 1].append(one)
        throughput = load.versions / outcome.time
        row[name] = {
            "versions_per_median_duration": round(throughput, 3),
            "longest_whole": round((bound + 1) / throughput, 2),
            "dropped_share": [dropped_share(one) for one in bins],
        }
    return row
