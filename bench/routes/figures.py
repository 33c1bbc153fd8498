"""Figures of each route from the measurements of its versions. Pure, except `show`."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.routes.variants import REFERENCE

ON_THE_PATH = ("proximal", "interpolate", "known", "cut", "tick", "distance", "published")
"""Parts of the time from the batch to the version: the source of the proximal; interpolation inside the passes; waiting
for scores; a cut; the update of a moving average and its distance to the policy; the route's work after a version."""
INSIDE_TRAINING = ("proximal", "interpolate", "cut", "tick", "distance")
SCORED = ("scored_early", "scored_at_cut", "scored_in_step")
STALL_SHARE = 0.25
NO_WEIGHTS = 0.001
"""A smaller share of a copy counts as no weights: a few buffers."""
ONE_COPY = 1.01
FORMULA_SLACK = 1.02
"""A pass over a part of a row includes its prompt, which the formula leaves out."""

LEGEND = """\
step    seconds of forward and backward passes and the optimizer step
extra   seconds that old log-probs add before the version; of step: as a share of the step; CPU: the same in CPU time
aside   time of early scores and of a replica, off the critical path, as a share of the step
late    seconds from a complete batch until the learner takes it
copies  additional copies of the bf16 model in the learner; MB: read from the store; scored: tokens; exact: of values
stall   pause of workers until the weights may change; hold: until the next version; shares of a step with publishing
"""

Measurements = Mapping[str, Any]
"""Measurements of one version, from bench/routes/instrumented_learner.py and VariantRun.turn."""


def figures(
    measured: Mapping[str, Sequence[Measurements]], tensor_bytes: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Return the figures by variant: medians of times and means of counts over the measured versions.

    tensor_bytes: see instrumented_learner.tensor_bytes.
    """
    base = tensor_bytes[REFERENCE]["other"]
    return {name: _figures(versions, tensor_bytes[name], base) for name, versions in measured.items()}


def _figures(versions: Sequence[Measurements], tensor_bytes: Mapping[str, int], base: int) -> dict[str, Any]:
    held = max(0, tensor_bytes["other"] - base)
    counted = [version["counts"] for version in versions]
    trainable = _total(counted, "trainable")
    replica = [version["replica"].get("tokens", 0.0) for version in versions]
    return {
        "extra_step_share": _median(versions, lambda v: extra_s(v) / step_s(v)),
        "extra_cpu_share": _median(versions, lambda v: extra_cpu_s(v) / step_cpu_s(v)),
        "off_path_share": _median(versions, lambda v: off_path_s(v) / step_s(v)),
        "weight_bytes_ratio": round(held / tensor_bytes["copy"], 4),
        "weight_bytes": held,
        "value_bytes": tensor_bytes["values"],
        "stall_share": _median(versions, lambda v: stall_s(v) / whole_s(v)),
        "hold_share": _median(versions, lambda v: v["hold_s"] / whole_s(v)),
        "step_s": _median(versions, step_s),
        "step_cpu_s": _median(versions, step_cpu_s),
        "extra_s": _median(versions, extra_s),
        "extra_cpu_s": _median(versions, extra_cpu_s),
        "extra_parts_s": {part: _median(versions, lambda v, p=part: v["seconds"].get(p, 0.0)) for part in ON_THE_PATH},
        "early_s": _median(versions, lambda v: v["seconds"].get("early", 0.0)),
        "early_cpu_s": _median(versions, lambda v: v["cpu"].get("early", 0.0)),
        "replica_s": _median(versions, replica_s),
        "replica_cpu_s": _median(versions, lambda v: v["replica"].get("cpu_s", 0.0)),
        "wait_s": _median(versions, lambda v: v["wait_s"]),
        "pickup_s": _median(versions, lambda v: v["pickup_s"]),
        "publish_s": _median(versions, lambda v: v["seconds"]["publish"]),
        "cut_s": {part: _median(versions, lambda v, p=part: v["cut"].get(p, 0.0)) for part in versions[0]["cut"]},
        "hold_s": _median(versions, lambda v: v["hold_s"]),
        "hold_parts_s": {
            part: _median(versions, lambda v, p=part: hold_parts_s(v)[p]) for part in ("cut", "step", "publish", "rest")
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


def step_s(version: Measurements) -> float:
    """Return the seconds of forward and backward passes and the optimizer step, without interpolation."""
    seconds = version["seconds"]
    return float(seconds["passes"] - seconds.get("interpolate", 0.0) + seconds["step"])


def whole_s(version: Measurements) -> float:
    """Return the seconds of the step and of publishing the version."""
    return step_s(version) + float(version["seconds"]["publish"])


def extra_s(version: Measurements) -> float:
    """Return the seconds that old log-probs add before the version."""
    return float(sum(version["seconds"].get(part, 0.0) for part in ON_THE_PATH))


def step_cpu_s(version: Measurements) -> float:
    """Return the CPU seconds of training without the parts for old log-probs."""
    cpu = version["cpu"]
    return float(cpu["train"] - sum(cpu.get(part, 0.0) for part in INSIDE_TRAINING))


def extra_cpu_s(version: Measurements) -> float:
    """Return the CPU seconds of old log-probs on the critical path."""
    return float(sum(version["cpu"].get(part, 0.0) for part in ON_THE_PATH))


def replica_s(version: Measurements) -> float:
    """Return the seconds of a replica's passes and loads."""
    return float(version["replica"].get("pass_s", 0.0) + version["replica"].get("load_s", 0.0))


def off_path_s(version: Measurements) -> float:
    """Return the seconds of old log-probs off the critical path."""
    return float(version["seconds"].get("early", 0.0)) + replica_s(version)


def stall_s(version: Measurements) -> float:
    """Return the seconds from the request of a cut until the weights may change."""
    return float(version["cut"].get("stall", 0.0))


def hold_parts_s(version: Measurements) -> dict[str, float]:
    """Return the parts of the pause of the workers, seconds: the cut, the step, publishing, and the rest."""
    if not version["hold_s"]:
        return {"cut": 0.0, "step": 0.0, "publish": 0.0, "rest": 0.0}
    parts = {"cut": stall_s(version), "step": version["seconds"]["step"], "publish": version["seconds"]["publish"]}
    return parts | {"rest": version["hold_s"] - sum(parts.values())}


def targets(routes: Mapping[str, Measurements]) -> dict[str, bool]:
    """Return which targets of the measured routes are met."""
    met: dict[str, bool] = {}
    if "interruption" in routes:
        met["interruption holds no weights"] = routes["interruption"]["weight_bytes_ratio"] < NO_WEIGHTS
        met[f"interruption stalls for less than {STALL_SHARE} of a step"] = (
            routes["interruption"]["stall_share"] < STALL_SHARE
        )
    if "snapshot" in routes:
        met["snapshot holds at most one copy"] = routes["snapshot"]["weight_bytes_ratio"] < ONE_COPY
    return met


def row_targets(rows: Mapping[str, Mapping[str, Measurements]]) -> dict[str, bool]:
    """Return which targets of the rows of 1, 2 and 4 versions are met."""
    if not rows:
        return {}
    exact, average = rows["1"]["snapshot"], rows["1"]["ewma_prox"]
    cheaper = exact["extra_step_share"] <= average["extra_step_share"]
    met = {"exact costs at most what EWMA costs, rows of one version": cheaper}
    for width, variants in rows.items():
        exact = variants["snapshot"]
        met[f"the formula's passes, rows of {width}"] = exact["passes_per_row"] <= exact["formula"] * FORMULA_SLACK
    return met


def show(routes: Mapping[str, Measurements], met: Mapping[str, bool]) -> None:
    """Print the table and the targets."""
    if routes:
        _show_routes(routes)
    for target, reached in met.items():
        print(f"{'met' if reached else 'MISSED':7} {target}", flush=True)


def _show_routes(routes: Mapping[str, Measurements]) -> None:
    print(LEGEND)
    print(
        f"{'':22} {'step':>6} {'extra':>7} {'of step':>8} {'CPU':>6} {'aside':>6} {'late':>6} {'copies':>7} "
        f"{'MB':>6} {'scored':>7} {'exact':>6} {'stall':>6} {'hold':>6}"
    )
    for name, route in routes.items():
        print(
            f"{name:22} {route['step_s']:6.2f} {route['extra_s']:7.3f} {route['extra_step_share']:8.1%} "
            f"{route['extra_cpu_share']:6.1%} {route['off_path_share']:6.1%} {route['pickup_s']:6.2f} "
            f"{route['weight_bytes_ratio']:7.2f} {route['fetched_bytes'] / 1e6:6.1f} {route['scored_tokens']:7.0f} "
            f"{route['exact_share']:6.1%} {route['stall_share']:6.1%} {route['hold_share']:6.1%}"
        )


def _median(versions: Sequence[Measurements], value: Any) -> float:
    return round(float(median(value(version) for version in versions)), 5)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 1)


def _total(counted: Sequence[Mapping[str, int]], what: str) -> int:
    return sum(counts.get(what, 0) for counts in counted)


def _each(counted: Sequence[Mapping[str, int]], what: str) -> float:
    """Return the mean over the versions."""
    return round(_total(counted, what) / len(counted), 1)


def _shares(versions: Sequence[Measurements]) -> dict[str, float]:
    """Return the share of the trained tokens by staleness."""
    total: dict[int, int] = {}
    for version in versions:
        for staleness, tokens in version["staleness"].items():
            total[staleness] = total.get(staleness, 0) + tokens
    return {str(staleness): round(total[staleness] / sum(total.values()), 3) for staleness in sorted(total)}
