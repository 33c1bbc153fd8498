"""A run's removals, leaks and alerts, added up over its versions. Pure."""

import math
from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]
COUNTS = ("tokens", "active", "removed", "overlap", "repeats", "masked", "clipped")
WRONGS = (
    "masked_wrongly", "kept_wrongly", "clipped_wrongly", "unclipped_wrongly", "removed_wrongly", "trained_wrongly",
)  # fmt: skip


def removal(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Tokens removed by cause, over the run: `causes` -> [by it, by it alone]; None where nobody counted.

    `advantage`: of the sum of |A|, weighed by each version's tokens.
    """
    told = [line["removal"] for line in lines if "removal" in line]
    if not told:
        return None
    causes: dict[str, list[int]] = {}
    for part in told:
        for cause, (marginal, exclusive) in part["causes"].items():
            sums = causes.setdefault(cause, [0, 0])
            sums[0], sums[1] = sums[0] + marginal, sums[1] + exclusive
    past = [part["masked_past_clip"] for part in told if part["masked_past_clip"] is not None]
    shares = {name: _mean([(part[name], part["tokens"]) for part in told]) for name in _SHARES}
    counts = {name: sum(part[name] for part in told) for name in COUNTS}
    return counts | {"masked_past_clip": sum(past) if past else None} | shares | {"causes": causes}


def leak(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Of the audited versions, weighed by tokens: rms and mean of log surrogate / old, nats, as a whole and
    `by_staleness`; shares of tokens judged otherwise than with old log-probs, None for a constraint that is off. None
    when no version was audited."""
    told = [line["leak"] for line in lines if line.get("leak")]
    if not told:
        return None
    stalenesses = sorted({int(age) for part in told for age in part["by_staleness"]})
    return {
        "versions": len(told),
        "tokens": int(sum(part["tokens"] for part in told)),
        **_leak(told),
        **{name: _mean([(part[name], part["tokens"]) for part in told]) for name in WRONGS},
        "by_staleness": {
            str(age): _leak([part["by_staleness"][str(age)] for part in told if str(age) in part["by_staleness"]])
            for age in stalenesses
        },
    }


def alert_spans(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each alert from its beginning to its end, in versions, with what it said last; `on`: at the newest version."""
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


_SHARES = ("advantage", "positive", "negative")


def _leak(parts: Sequence[Line]) -> dict[str, float | None]:
    square = _mean([(part["leak_rms"] ** 2, part["tokens"]) for part in parts if part["leak_rms"] is not None])
    return {
        "rms": None if square is None else math.sqrt(square),
        "mean": _mean([(part["leak_mean"], part["tokens"]) for part in parts]),
    }


def _mean(pairs: Sequence[tuple[float | None, float]]) -> float | None:
    """Weighted, of those that are known."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
