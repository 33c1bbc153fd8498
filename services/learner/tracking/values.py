"""The numbers of a line of history.jsonl or evaluations.jsonl that trackers get. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

PLAIN = (
    "reward", "reward_deviation", "loss", "grad_norm", "learning_rate", "length", "tokens", "batch", "truncated",
    "cuts", "multi_version", "ess", "staleness_mean", "staleness_max", "active_share", "lr_factor", "skipped",
    "seconds", "settings",
)  # fmt: skip
OF_TOKENS = ("entropy", "log_discrepancy_abs", "log_staleness_ratio_abs", "masked", "clipped")


def values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return name -> value of everything that is known.

    >>> values({"reward": 0.5, "successes": "01", "batch": 2, "grad_norm": None, "all": {"entropy": 1.5}})
    {'reward': 0.5, 'batch': 2.0, 'success': 0.5, 'tokens/entropy': 1.5}
    """
    return {name: float(value) for name, value in _found(line) if value is not None and math.isfinite(value)}


def _found(line: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield from ((name, line[name]) for name in PLAIN if name in line)
    if line.get("batch"):
        yield "success", line["successes"].count("1") / line["batch"]
    tokens = line.get("all", {})
    yield from ((f"tokens/{name}", tokens[name]) for name in OF_TOKENS if name in tokens)
    for phase, seconds in line.get("phases", {}).items():
        yield f"seconds/{phase}", seconds
    for environment, own in line.get("by_environment", {}).items():
        yield f"reward/{environment}", own["reward"]
    for environment, result in line.get("evaluation", {}).items():
        for name in ("avg", "passed"):
            yield f"evaluation/{environment}/{name}", (result[name] or {}).get("value")
    if "evaluation" in line:
        return  # its trajectories are not of the training
    for reason, count in line.get("trajectories", {}).get("dropped", {}).items():
        yield f"dropped/{reason}", count
