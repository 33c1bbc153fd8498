"""Aggregates a run's removals, surrogate errors and alerts over its versions. Pure."""

import math
from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]
COUNTS = ("tokens", "active", "removed", "overlap", "repeats", "masked", "clipped")
WRONGS = (
    "masked_wrongly", "kept_wrongly", "clipped_wrongly", "unclipped_wrongly", "removed_wrongly", "trained_wrongly",
)  # fmt: skip


def removal(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return removed tokens of the run: `causes` -> [removed by it, removed by it alone]. None: no line has counts.

    `advantage`: removed share of the sum of |A|, weighted by each version's tokens.
    """
    counted = [line["removal"] for line in lines if "removal" in line]
    if not counted:
        return None
    causes: dict[str, list[int]] = {}
    for part in counted:
        for cause, (marginal, exclusive) in part["causes"].items():
            sums = causes.setdefault(cause, [0, 0])
            sums[0], sums[1] = sums[0] + marginal, sums[1] + exclusive
    past = [part["masked_past_clip"] for part in counted if part["masked_past_clip"] is not None]
    shares = {name: weighted_mean([(part[name], part["tokens"]) for part in counted]) for name in _SHARES}
    counts = {name: sum(part[name] for part in counted) for name in COUNTS}
    return counts | {"masked_past_clip": sum(past) if past else None} | shares | {"causes": causes}


def leak(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return the surrogate error over the audited versions, weighted by tokens; None without audited versions.

    rms and mean of log surrogate / old in nats, in total and `by_staleness`, and the shares of tokens that are masked
    or clipped differently than with old log-probs (None for a constraint that is off).
    """
    audited = [line["leak"] for line in lines if line.get("leak")]
    if not audited:
        return None
    stalenesses = sorted({int(age) for part in audited for age in part["by_staleness"]})
    return {
        "versions": len(audited),
        "tokens": int(sum(part["tokens"] for part in audited)),
        **_leak(audited),
        **{name: weighted_mean([(part[name], part["tokens"]) for part in audited]) for name in WRONGS},
        "by_staleness": {
            str(age): _leak([part["by_staleness"][str(age)] for part in audited if str(age) in part["by_staleness"]])
            for age in stalenesses
        },
    }


def alert_spans(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return each alert with its first and last version and its last text; `on`: active at the newest version."""
    found: list[dict[str, Any]] = []
    open_now: dict[str, dict[str, Any]] = {}
    for line in lines:
        now = {alert["rule"]: alert for alert in line.get("alerts", ())}
        for rule in [rule for rule in open_now if rule not in now]:
            open_now.pop(rule)["on"] = False
        for rule, alert in now.items():
            if rule not in open_now:
                open_now[rule] = {"rule": rule, "level": alert["level"], "first": line["version"]}
                found.append(open_now[rule])
            open_now[rule] |= {"last": line["version"], "says": alert["says"], "on": True}
    return found


def token_fates(lines: Sequence[Line]) -> dict[str, dict[str, dict[str, int]]]:
    """Return trained and lost tokens of the run: `length` or `seconds` -> lower edge of the bin -> counts.

    The bins are in ascending order. Empty if no line has counts.
    """
    sums: dict[str, dict[str, dict[str, int]]] = {}
    for line in lines:
        for by, bins in line.get("token_fates", {}).items():
            for edge, (trained, lost) in bins.items():
                counts = sums.setdefault(by, {}).setdefault(edge, {"trained": 0, "lost": 0})
                counts["trained"], counts["lost"] = counts["trained"] + trained, counts["lost"] + lost
    return {by: dict(sorted(bins.items(), key=lambda item: float(item[0]))) for by, bins in sums.items()}


def stored(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return versions stored and their bytes, beside full copies; `share`: of their bytes. None: no line has counts.

    The line of a version precedes its storage, so the sum lacks the version trained last.
    """
    counted = [counts for line in lines if (counts := line.get("stored"))]
    if not counted:
        return None
    sums = {name: sum(counts[name] for counts in counted) for name in ("versions", "bytes", "full_bytes")}
    return sums | {"share": sums["bytes"] / sums["full_bytes"] if sums["full_bytes"] else None}


_SHARES = ("advantage", "positive", "negative")


def _leak(parts: Sequence[Line]) -> dict[str, float | None]:
    square = weighted_mean([(part["leak_rms"] ** 2, part["tokens"]) for part in parts if part["leak_rms"] is not None])
    return {
        "rms": None if square is None else math.sqrt(square),
        "mean": weighted_mean([(part["leak_mean"], part["tokens"]) for part in parts]),
    }


def weighted_mean(pairs: Sequence[tuple[float | None, float]]) -> float | None:
    """Return the weighted mean of the known values."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
