"""From what was noted of each version to a route's figures. Pure but for `show`."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.routes.variants import REFERENCE

ON_THE_PATH = ("proximal", "between", "known", "cut", "tick", "distance", "published")
"""Between the batch and its version: the source; an interpolation inside the passes; waiting for scores; a cut; a
moving average and how far it is from the policy; bookkeeping."""
INSIDE_TRAINING = ("proximal", "between", "cut", "tick", "distance")
SCORED = ("scored_early", "scored_at_cut", "scored_in_step")
STALL_SHARE = 0.25
NO_WEIGHTS = 0.001
"""Less than so much of a copy is no weights: a few buffers."""
ONE_COPY = 1.01

LEGEND = """\
step    s of forward and backward passes and the optimizer's step
extra   s by which the version comes later; as a share of the step; the same in CPU time
aside   spent while nobody waits for it: early scores, a replica's work; as a share of the step
late    s from the moment a batch is complete until it is taken
copies  of the bf16 model that the learner holds besides it; MB fetched from the store; tokens scored; exact values
stall   workers stand still until the weights may change; hold: until the next version; shares of a step with publishing
"""

Noted = Mapping[str, Any]
"""Of one version: bench/routes/instrumented_learner.py and VariantRun.turn."""


def figures(measured: Mapping[str, Sequence[Noted]], weights: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Name -> figures: medians over the versions measured, totals of what is counted.

    weights: bytes of one copy of the model (copy), and of all tensors but the policy's and its optimizer's (other).
    """
    base = weights[REFERENCE]["other"]
    return {name: _figures(versions, weights[name], base) for name, versions in measured.items()}


def _figures(versions: Sequence[Noted], weights: Mapping[str, int], base: int) -> dict[str, Any]:
    held = max(0, weights["other"] - base)
    counted = [version["counts"] for version in versions]
    trainable = _total(counted, "trainable")
    replica = [version["replica"].get("tokens", 0.0) for version in versions]
    return {
        "extra_step_share": _middle(versions, lambda v: extra_s(v) / step_s(v)),
        "extra_cpu_share": _middle(versions, lambda v: extra_cpu_s(v) / step_cpu_s(v)),
        "off_path_share": _middle(versions, lambda v: off_path_s(v) / step_s(v)),
        "weight_bytes_ratio": round(held / weights["copy"], 4),
        "weight_bytes": held,
        "value_bytes": weights["values"],
        "stall_share": _middle(versions, lambda v: stall_s(v) / whole_s(v)),
        "hold_share": _middle(versions, lambda v: v["hold_s"] / whole_s(v)),
        "step_s": _middle(versions, step_s),
        "step_cpu_s": _middle(versions, step_cpu_s),
        "extra_s": _middle(versions, extra_s),
        "extra_cpu_s": _middle(versions, extra_cpu_s),
        "extra_parts_s": {part: _middle(versions, lambda v, p=part: v["seconds"].get(p, 0.0)) for part in ON_THE_PATH},
        "early_s": _middle(versions, lambda v: v["seconds"].get("early", 0.0)),
        "early_cpu_s": _middle(versions, lambda v: v["cpu"].get("early", 0.0)),
        "replica_s": _middle(versions, replica_s),
        "replica_cpu_s": _middle(versions, lambda v: v["replica"].get("cpu_s", 0.0)),
        "wait_s": _middle(versions, lambda v: v["wait_s"]),
        "pickup_s": _middle(versions, lambda v: v["pickup_s"]),
        "publish_s": _middle(versions, lambda v: v["seconds"]["publish"]),
        "cut_s": {part: _middle(versions, lambda v, p=part: v["cut"].get(p, 0.0)) for part in versions[0]["cut"]},
        "hold_s": _middle(versions, lambda v: v["hold_s"]),
        "hold_parts_s": {
            part: _middle(versions, lambda v, p=part: hold_parts_s(v)[p]) for part in ("cut", "step", "publish", "rest")
        },
        "fetched_bytes": _each(counted, "fetched_bytes"),
        "loads": _each(counted, "loads") + _mean([v["replica"].get("loads", 0.0) for v in versions]),
        "scored_tokens": sum(_each(counted, kind) for kind in SCORED) + _mean(replica),
        **{f"{kind}_tokens": _each(counted, kind) for kind in SCORED},
        "trained_tokens": _each(counted, "trainable"),
        "exact_share": round(_total(counted, "exact") / trainable, 4) if trainable else 0.0,
        "versions_per_trajectory": round(_total(counted, "versions") / max(1, _total(counted, "trajectories")), 2),
        "staleness": _shares(versions),
        "dropped_trajectories": versions[-1]["dropped"],
        "versions": len(versions),
    }


def step_s(version: Noted) -> float:
    """Forward and backward passes and the optimizer's step."""
    seconds = version["seconds"]
    return float(seconds["passes"] - seconds.get("between", 0.0) + seconds["step"])


def whole_s(version: Noted) -> float:
    """A whole step: the same, and making the version known."""
    return step_s(version) + float(version["seconds"]["publish"])


def extra_s(version: Noted) -> float:
    """Seconds by which the version came later for old log-probs."""
    return float(sum(version["seconds"].get(part, 0.0) for part in ON_THE_PATH))


def step_cpu_s(version: Noted) -> float:
    """CPU time of the training without what is there for old log-probs."""
    cpu = version["cpu"]
    return float(cpu["train"] - sum(cpu.get(part, 0.0) for part in INSIDE_TRAINING))


def extra_cpu_s(version: Noted) -> float:
    """CPU time on the critical path for old log-probs."""
    return float(sum(version["cpu"].get(part, 0.0) for part in ON_THE_PATH))


def replica_s(version: Noted) -> float:
    """A replica's passes and loads."""
    return float(version["replica"].get("pass_s", 0.0) + version["replica"].get("load_s", 0.0))


def off_path_s(version: Noted) -> float:
    """Seconds spent on old log-probs while nobody waited for them."""
    return float(version["seconds"].get("early", 0.0)) + replica_s(version)


def stall_s(version: Noted) -> float:
    """From a cut's request until the weights may change."""
    return float(version["cut"].get("stall", 0.0))


def hold_parts_s(version: Noted) -> dict[str, float]:
    """What the workers stood still for: the cut, the step, making the version known, and all that comes in between."""
    if not version["hold_s"]:
        return {"cut": 0.0, "step": 0.0, "publish": 0.0, "rest": 0.0}
    parts = {"cut": stall_s(version), "step": version["seconds"]["step"], "publish": version["seconds"]["publish"]}
    return parts | {"rest": version["hold_s"] - sum(parts.values())}


def targets(routes: Mapping[str, Noted]) -> dict[str, bool]:
    """Which of the aims are met, of the routes that were measured."""
    aims: dict[str, bool] = {}
    if "interruption" in routes:
        aims["interruption holds no weights"] = routes["interruption"]["weight_bytes_ratio"] < NO_WEIGHTS
        aims[f"interruption stalls for less than {STALL_SHARE} of a step"] = (
            routes["interruption"]["stall_share"] < STALL_SHARE
        )
    if "snapshot" in routes:
        aims["snapshot holds at most one copy"] = routes["snapshot"]["weight_bytes_ratio"] < ONE_COPY
    return aims


def show(routes: Mapping[str, Noted], met: Mapping[str, bool]) -> None:
    """A table for a person."""
    print(LEGEND)
    print(
        f"{'':22} {'step':>6} {'extra':>7} {'of step':>8} {'CPU':>6} {'aside':>6} {'late':>6} {'copies':>7} "
        f"{'MB':>6} {'scored':>7} {'exact':>6} {'stall':>6} {'hold':>6}"
    )
    for name, of in routes.items():
        print(
            f"{name:22} {of['step_s']:6.2f} {of['extra_s']:7.3f} {of['extra_step_share']:8.1%} "
            f"{of['extra_cpu_share']:6.1%} {of['off_path_share']:6.1%} {of['pickup_s']:6.2f} "
            f"{of['weight_bytes_ratio']:7.2f} {of['fetched_bytes'] / 1e6:6.1f} {of['scored_tokens']:7.0f} "
            f"{of['exact_share']:6.1%} {of['stall_share']:6.1%} {of['hold_share']:6.1%}"
        )
    for aim, reached in met.items():
        print(f"{'met' if reached else 'MISSED':7} {aim}", flush=True)


def _middle(versions: Sequence[Noted], value: Any) -> float:
    return round(float(median(value(version) for version in versions)), 5)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 1)


def _total(counted: Sequence[Mapping[str, int]], what: str) -> int:
    return sum(counts.get(what, 0) for counts in counted)


def _each(counted: Sequence[Mapping[str, int]], what: str) -> float:
    """Mean over the versions."""
    return round(_total(counted, what) / len(counted), 1)


def _shares(versions: Sequence[Noted]) -> dict[str, float]:
    """Staleness -> its share of the trained tokens."""
    total: dict[int, int] = {}
    for version in versions:
        for staleness, tokens in version["staleness"].items():
            total[staleness] = total.get(staleness, 0) + tokens
    return {str(staleness): round(total[staleness] / sum(total.values()), 3) for staleness in sorted(total)}
