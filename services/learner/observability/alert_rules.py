"""Alert rules: they detect in history.jsonl that discrepancy and staleness are confused, or that other values replace
old log-probs (docs/algorithms/metrics-and-alerts.md). Pure.

The batch of one version may hold few tokens of a staleness. So each rule evaluates a window of versions, and slopes
against staleness are fitted within each version (staleness_slope.py). While an alert is on, its rule uses half of the
bounds, so that the alert does not flicker.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from palimpsest.common.config.proximal import EXACT_KINDS, PROXIMAL_KINDS
from palimpsest.services.learner.buffer.token_fates import DURATION, LENGTH
from palimpsest.services.learner.observability.staleness_slope import Point, StalenessSlope, fit_staleness_slope

Line = Mapping[str, Any]
WINDOW = 20
"""Number of newest versions that a rule evaluates."""
LEAST_VERSIONS = 8
"""Minimum number of versions in the window with enough tokens."""
LEAST_TOKENS = 30
"""Minimum tokens of a staleness in a batch. A rule ignores a staleness with fewer."""
ERRORS = 3.0
"""Minimum absolute slope, in its standard errors."""
MASK_SLOPE = 0.02
"""Bound on the change of the masked or clipped share of tokens with each version of staleness."""
RISE = 0.25
"""Bound on the rise of mean |log discrepancy| with each version of staleness, as a share of that mean."""
IDLE = 0.001
"""A clip is idle if it removes at most this share of tokens."""
STILL = 0.001
"""The staleness ratio counts as 1 if |log staleness ratio| is at most this share of |log total ratio|."""
ONE = 0.999
"""The discrepancy counts as 1 everywhere if it is exactly 1 for at least this share of tokens."""
LOST_RATIO, LOST_GAP = 1.5, 0.1
"""The lost share of the tokens of slow or long trajectories must exceed that of all tokens by this factor and by this
difference."""
MOSTLY = 0.5
"""Bound on the share of tokens that masks and clips remove."""
LEAST_SHARE = 0.02
"""Bins with a smaller share of the tokens are ignored."""
PERSISTS = 5
"""Number of versions for which the discrepancy must be 1; also the number of versions whose fallbacks are added up."""
CLIPPING = ("clipped", "minirl", "cispo", "gspo")
"""Objectives with a clip."""
MAY_EQUAL_BEHAVIOR = tuple(kind for kind, row in PROXIMAL_KINDS.items() if row.may_equal_behavior)
"""Kinds of proximal that are, or can be configured to be, the behavior policy."""
FALLBACKS = {
    "missing": "had no old log-prob and were left out of the loss",
    "surrogate": "had a surrogate's log-prob in place of the old one",
    "nonfinite": "had a log-prob that is not finite and were left out of the loss",
}
"""Descriptions of the counters in a line's `fallbacks`. Other counters are reported by their name."""


@dataclass(frozen=True, slots=True)
class Alert:
    """The finding of a rule at a version."""

    rule: str
    level: Literal["warning", "notice"]
    """A notice reports an effect of the configuration, and is given once."""
    value: float
    """Slope, share or count that the rule evaluates."""
    says: str
    """The fault, its number, and what to do."""


def judge(lines: Sequence[Line]) -> list[Alert]:
    """Return the alerts of the newest line. lines: oldest first.

    The earlier lines must hold their `alerts`; the newest need not. Lines with another proximal or objective are
    ignored, and so are values that the lines of an older release lack.
    """
    if not lines:
        return []
    newest = lines[-1]
    window = [line for line in lines[-WINDOW:] if _alike(line, newest)]
    before = {alert["rule"] for alert in lines[-2].get("alerts", ())} if len(lines) > 1 else set()
    found = (rule(window, 0.5 if name in before else 1.0) for name, rule in _RULES.items())
    return [alert for alert in found if alert is not None]


def mask_by_staleness(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """|slope of the masked share against staleness| > MASK_SLOPE. ease: factor on the bounds.

    Only masks of single tokens count: the others remove long trajectories, which are also the stale ones.
    """
    found = fit_staleness_slope(
        [_points(line["by_staleness"], "token_masked") for line in lines], least_tokens=LEAST_TOKENS
    )
    if not _firm(found, ease) or abs(found.slope) <= MASK_SLOPE * ease:
        return None
    return Alert(
        "mask_by_staleness",
        "warning",
        found.slope,
        f"the masked share of tokens changes by {100 * found.slope:+.1f} points with each version of staleness, over "
        f"{found.versions} versions, but the engine's discrepancy does not depend on staleness: {_advice(lines)}",
    )


def clip_idle(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """The clip removes no stale tokens of the first minibatch, although it should. ease: factor on the bounds.

    It should if the share of tokens with a total ratio past the clip rises with staleness, or if the weights were
    trained and the staleness ratio is still 1. Neither holds for a policy that hardly changes.
    """
    if lines[-1].get("objective") not in CLIPPING:
        return None
    stale = [_stale(line) for line in lines]
    counted = [sums for sums in stale if sums["tokens"] >= LEAST_TOKENS]
    tokens = sum(sums["tokens"] for sums in counted)
    if len(counted) < LEAST_VERSIONS:
        return None
    share = sum(sums["clipped"] for sums in counted) / tokens
    if share > IDLE / ease:
        return None
    staleness, total = sum(sums["staleness"] for sums in counted), sum(sums["total"] for sums in counted)
    trained = sum((line.get("grad_norm") or 0.0) > 0 and line.get("learning_rate", 1.0) > 0 for line in lines)
    ratio_is_one = trained >= len(lines) / 2 and total > 0 and staleness <= STILL / ease * total
    past_clip = fit_staleness_slope(
        [_points(line["first_minibatch"], "past_clip") for line in lines], least_tokens=LEAST_TOKENS
    )
    if not ratio_is_one and not (_firm(past_clip, ease) and past_clip.slope > MASK_SLOPE * ease):
        return None
    return Alert(
        "clip_idle",
        "warning",
        share,
        f"the clip removes {100 * share:.2f} % of stale tokens in the first minibatch, over {len(counted)} versions, "
        f"but the policy has changed since they were sampled: {_advice(lines)}",
    )


def discrepancy_by_staleness(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """Mean |log discrepancy| rises with staleness by more than RISE of its mean, and so does its ratio to the entropy.

    ease: factor on the bounds. Both are needed: rounding is larger where the entropy is high, and staler tokens may be
    tokens of other entropy.
    """
    plain = fit_staleness_slope(
        [_points(line["by_staleness"], "log_discrepancy_abs") for line in lines], least_tokens=LEAST_TOKENS
    )
    per_nat = fit_staleness_slope(
        [_points(line["by_staleness"], "log_discrepancy_abs", over="entropy") for line in lines],
        least_tokens=LEAST_TOKENS,
    )
    for found in (plain, per_nat):
        if not _firm(found, ease) or found.errors < 0 or found.slope <= RISE * ease * found.level:
            return None
    assert plain is not None
    return Alert(
        "discrepancy_by_staleness",
        "warning",
        plain.slope,
        f"mean |log discrepancy| rises by {plain.slope:.2g} nats with each version of staleness, over {plain.versions} "
        f"versions (mean {plain.level:.2g} nats), so it contains staleness: {_advice(lines)}",
    )


def discrepancy_is_one(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:  # noqa: ARG001  no bound to ease
    """Every discrepancy is exactly 1. Tokens that the engine was certain of do not count: any two engines agree on
    them."""
    same = [line["all"]["same"] for line in lines if (line["all"].get("unsure") or 0.0) >= LEAST_TOKENS]
    if len(same) < PERSISTS or min(same[-PERSISTS:]) < ONE:
        return None
    newest = lines[-1]
    if newest.get("kind") in MAY_EQUAL_BEHAVIOR:
        if len(same) > PERSISTS and same[-PERSISTS - 1] >= ONE:
            return None  # the notice was given before
        return Alert(
            "discrepancy_is_one",
            "notice",
            same[-1],
            f'the proximal is the behavior policy, as configured (learner.proximal.kind = "{newest["kind"]}"): the '
            f"discrepancy cannot be measured or masked, and the clip acts on the total ratio",
        )
    return Alert(
        "discrepancy_is_one",
        "warning",
        same[-1],
        f"the discrepancy of {100 * same[-1]:.1f} % of tokens is exactly 1, for {PERSISTS} versions. Two engines never "
        f"agree exactly: behavior log-probs were used as proximal ones, or the learner's log-probs as behavior ones. "
        f"Check that the engine reports its own log-probs and that no code fills in missing ones",
    )


def fallback(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:  # noqa: ARG001  no bound to ease
    """Other values replaced old log-probs, or tokens without a number were left out."""
    counts: dict[str, int] = {}
    newest = lines[-PERSISTS:]
    for line in newest:
        for name, count in line.get("fallbacks", {}).items():
            counts[name] = counts.get(name, 0) + count
    if not any(counts.values()):
        return None
    described = ", ".join(f"{count} {FALLBACKS.get(name, name)}" for name, count in sorted(counts.items()) if count)
    return Alert(
        "fallback",
        "warning",
        float(sum(counts.values())),
        f"in the newest {len(newest)} versions, {described}: look for missing or non-finite log-probs in the learner's "
        f"log, and check learner.proximal.missing",
    )


def lost_by_duration(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """Trajectories of some duration or length lose another share of their tokens to the staleness bound than all do.

    ease: factor on the bounds.
    """
    counted = [fates for line in lines if (fates := line.get("token_fates"))]
    if len(counted) < LEAST_VERSIONS:
        return None
    worst: tuple[float, float, str, float] | None = None
    for by in (DURATION, LENGTH):
        sums: dict[float, tuple[int, int]] = {}
        for fates in counted:
            for edge, (trained, lost) in fates.get(by, {}).items():
                before = sums.get(float(edge), (0, 0))
                sums[float(edge)] = before[0] + trained, before[1] + lost
        total, all_lost = sum(map(sum, sums.values())), sum(lost for _, lost in sums.values())
        for edge, (trained, lost) in sums.items():
            tokens = trained + lost
            if tokens < max(LEAST_TOKENS, LEAST_SHARE * total):
                continue
            share, of_all = lost / tokens, all_lost / total
            if share > LOST_RATIO * of_all and share - of_all > LOST_GAP * ease and (not worst or share > worst[0]):
                worst = share, of_all, by, edge
    if worst is None:
        return None
    share, of_all, by, edge = worst
    which = f"{edge:g} to {2 * edge:g} {'seconds' if by == DURATION else 'tokens'}"
    return Alert(
        "lost_by_duration",
        "warning",
        share,
        f"trajectories of {which} lose {100 * share:.0f} % of their tokens to learner.max_staleness, all trajectories "
        f"{100 * of_all:.0f} %, over {len(counted)} versions: the batches favor the others. Raise "
        f"learner.max_staleness, set learner.max_overtaking, or make slow tools faster",
    )


def mostly_removed(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """Masks and clips remove more than MOSTLY of the tokens of PERSISTS versions. ease: factor on the bound.

    The clip of CISPO does not count: it bounds the gradient of a token without removing it.
    """
    counted = [removal for line in lines[-PERSISTS:] if (removal := line.get("removal"))]
    tokens = sum(removal["tokens"] for removal in counted)
    if len(counted) < PERSISTS or tokens < LEAST_TOKENS:
        return None
    objective = lines[-1].get("objective")
    share = sum(removal["masked" if objective == "cispo" else "removed"] for removal in counted) / tokens
    if share <= MOSTLY * ease:
        return None
    marginals = [{name: times for name, (times, _) in removal["causes"].items()} for removal in counted]
    ((cause, count),) = sum(map(Counter, marginals), Counter[str]()).most_common(1)
    return Alert(
        "mostly_removed",
        "warning",
        share,
        f"masks and clips remove {100 * share:.0f} % of the tokens of the newest {PERSISTS} versions, {cause} "
        f"{100 * count / tokens:.0f} %: only the rest trains the policy. Lower learner.max_staleness or the learning "
        f"rate, or widen the bound of {cause}",
    )


_RULES: Mapping[str, Callable[[Sequence[Line], float], Alert | None]] = {
    "mask_by_staleness": mask_by_staleness,
    "clip_idle": clip_idle,
    "discrepancy_by_staleness": discrepancy_by_staleness,
    "discrepancy_is_one": discrepancy_is_one,
    "fallback": fallback,
    "lost_by_duration": lost_by_duration,
    "mostly_removed": mostly_removed,
}
RULES = tuple(_RULES)


def unknown_rules(line: Line) -> list[str]:
    """Return the rules that the line has no value for, for example because no token has a finite log-ratio.

    Such a line neither starts nor ends an alert.
    """
    aged, first = line["by_staleness"].values(), line["first_minibatch"].values()
    needed: dict[str, tuple[Iterable[Mapping[str, Any]], str]] = {
        "mask_by_staleness": (aged, "token_masked"),
        "discrepancy_by_staleness": (aged, "log_discrepancy_abs"),
        "discrepancy_is_one": ([line["all"]], "log_discrepancy_abs"),
    }
    if line.get("objective") in CLIPPING:
        needed["clip_idle"] = (first, "log_total_ratio_abs")
    return [
        rule
        for rule, (parts, key) in needed.items()
        if all(part.get(key, 0.0) is None for part in parts)  # a line of an older release may lack the key
    ]


def _alike(line: Line, newest: Line) -> bool:
    return all(line.get(name) == newest.get(name) for name in ("kind", "objective"))


def _firm(found: StalenessSlope | None, ease: float) -> TypeGuard[StalenessSlope]:
    """Whether there are enough versions, and the slope exceeds ERRORS standard errors. ease: factor on ERRORS."""
    return found is not None and found.versions >= LEAST_VERSIONS and abs(found.errors) > ERRORS * ease


def _points(by_staleness: Mapping[str, Mapping[str, float]], key: str, *, over: str | None = None) -> list[Point]:
    """Points of a line, one for each staleness that has the number `key` (divided by the number `over`).

    Tokens without a ratio do not count: no mask evaluates them.
    """
    points = []
    for staleness, values in by_staleness.items():
        value, divisor = values.get(key), 1.0 if over is None else values.get(over)
        if value is not None and divisor:
            tokens = values["tokens"] - values.get("missing", 0.0) - values.get("nonfinite", 0.0)
            points.append(Point(float(staleness), tokens, value / divisor))
    return points


def _stale(line: Line) -> dict[str, float]:
    """Sums over the tokens of the first minibatch with a staleness above 0."""
    sums = dict.fromkeys(("tokens", "clipped", "staleness", "total"), 0.0)
    for staleness, values in line["first_minibatch"].items():
        if int(staleness) > 0:
            tokens = values["tokens"]
            if values["log_total_ratio_abs"] is None:
                continue  # no token has a finite log-ratio
            sums["tokens"] += tokens
            sums["clipped"] += tokens * values["clipped"]
            sums["staleness"] += tokens * values["log_staleness_ratio_abs"]
            sums["total"] += tokens * values["log_total_ratio_abs"]
    return sums


def _advice(lines: Sequence[Line]) -> str:
    kind = lines[-1].get("kind")
    if kind is None or kind in EXACT_KINDS:
        return (
            "the proximal log-probs may not be of the tokens' versions; check the workers' canary errors and the "
            "learner's warnings about missing versions"
        )
    return f"the proximal is {kind}, a surrogate; set an exact learner.proximal.kind ({', '.join(EXACT_KINDS)})"
