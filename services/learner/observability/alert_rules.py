"""Signs that discrepancy and staleness are taken for one another, or that something stands in silently for old
log-probs, read off the newest lines of history.jsonl (docs/algorithms/metrics-and-alerts.md). Pure.

One version says little: a batch may hold few tokens of a staleness. So each rule looks at a window of versions, and
what is measured against staleness is measured within each of them (slopes.py). An alert that is on goes off at half of
what brought it on, so that it does not flicker.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from palimpsest.common.config.proximal import EXACT_KINDS, PROXIMAL_KINDS
from palimpsest.services.learner.observability.staleness_slope import Point, StalenessSlope, fit_staleness_slope

Line = Mapping[str, Any]
WINDOW = 20
"""Newest versions that are looked at."""
LEAST_VERSIONS = 8
"""So many of them must have something to say."""
LEAST_TOKENS = 30
"""A staleness with fewer tokens in a batch says nothing."""
ERRORS = 3.0
"""A slope counts from so many of its standard errors."""
MASK_SLOPE = 0.02
"""Share of tokens for each version of staleness: what mask or clip may rise by without an alert."""
RISE = 0.25
"""Share of its mean by which |log discrepancy| may rise with each version of staleness."""
IDLE = 0.001
"""A clip that takes no larger share of tokens does nothing."""
STILL = 0.001
"""Share of |log total ratio| below which the staleness ratio is nothing."""
ONE = 0.999
"""Share of tokens with a discrepancy of exactly 1 from which it is so everywhere."""
PERSISTS = 5
"""Versions for which that has to hold; and for which a fallback is remembered."""
CLIPPING = ("clipped", "minirl", "cispo", "gspo")
"""Objectives with a clip."""
MAY_EQUAL_BEHAVIOR = tuple(kind for kind, row in PROXIMAL_KINDS.items() if row.may_equal_behavior)
"""Kinds of proximal that are, or can be configured to be, the behavior policy."""
FALLBACKS = {
    "missing": "had no old log-prob and were left out of the loss",
    "surrogate": "had a surrogate's log-prob in place of the old one",
    "nonfinite": "had a log-prob that is not finite and were left out of the loss",
}
"""What is counted in a line's `fallbacks`, in words; other counters are told by their name."""


@dataclass(frozen=True, slots=True)
class Alert:
    """What a rule found at a version."""

    rule: str
    level: Literal["warning", "notice"]
    """A notice is about what the configuration asks for, and is given once."""
    value: float
    """Slope, share or count that the rule judges."""
    says: str
    """One sentence: what is wrong, the number, what to do."""


def judge(lines: Sequence[Line]) -> list[Alert]:
    """What is to be said at the newest line, given those before it, oldest first.

    The lines before hold their own `alerts`; the newest need not. Lines of another proximal or objective are passed
    over, and so is what a line of an older release does not hold.
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

    Only masks that judge each token by itself: the others remove long trajectories, which are stale ones, too.
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
        f"{found.versions} versions, though the engine's discrepancy has no age: {_advice(lines)}",
    )


def clip_idle(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """At the first minibatch the clip takes nothing of stale tokens, though it should.

    It should where the whole ratio is past the clip more often the staler the tokens are, or where the weights were
    trained and yet the staleness ratio is nothing at all. A policy that hardly moves gives neither.
    """
    if lines[-1].get("objective") not in CLIPPING:
        return None
    stale = [_stale(line) for line in lines]
    judged = [part for part in stale if part["tokens"] >= LEAST_TOKENS]
    tokens = sum(part["tokens"] for part in judged)
    if len(judged) < LEAST_VERSIONS:
        return None
    share = sum(part["clipped"] for part in judged) / tokens
    if share > IDLE / ease:
        return None
    apart = sum(part["staleness"] for part in judged), sum(part["total"] for part in judged)
    moved = sum((line.get("grad_norm") or 0.0) > 0 and line.get("learning_rate", 1.0) > 0 for line in lines)
    still = moved >= len(lines) / 2 and apart[1] > 0 and apart[0] <= STILL / ease * apart[1]
    hidden = fit_staleness_slope(
        [_points(line["first_minibatch"], "past_clip") for line in lines], least_tokens=LEAST_TOKENS
    )
    if not still and not (_firm(hidden, ease) and hidden.slope > MASK_SLOPE * ease):
        return None
    return Alert(
        "clip_idle",
        "warning",
        share,
        f"the clip takes {100 * share:.2f} % of stale tokens at the first minibatch, over {len(judged)} versions, "
        f"though the policy has moved on since they were sampled: {_advice(lines)}",
    )


def discrepancy_by_staleness(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:
    """Mean |log discrepancy| rises with staleness by more than RISE of its mean, also for each nat of entropy.

    Both, because rounding weighs more where the policy is undecided, and staler tokens may be other kinds of tokens.
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
        f"versions, at a mean of {plain.level:.2g}, so it holds staleness: {_advice(lines)}",
    )


def discrepancy_is_one(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:  # noqa: ARG001  there is no more or less
    """Every discrepancy is exactly 1. Only tokens that the engine was not certain of count: on others all agree."""
    same = [line["all"]["same"] for line in lines if line["all"].get("unsure", 0.0) >= LEAST_TOKENS]
    if len(same) < PERSISTS or min(same[-PERSISTS:]) < ONE:
        return None
    newest = lines[-1]
    if newest.get("kind") in MAY_EQUAL_BEHAVIOR:
        if len(same) > PERSISTS and same[-PERSISTS - 1] >= ONE:
            return None  # it has been said
        return Alert(
            "discrepancy_is_one",
            "notice",
            same[-1],
            f'the proximal is the behavior policy, as learner.proximal.kind = "{newest["kind"]}" asks for: no '
            f"discrepancy can be seen or masked, and the clip acts on the total ratio",
        )
    return Alert(
        "discrepancy_is_one",
        "warning",
        same[-1],
        f"the discrepancy of {100 * same[-1]:.1f} % of tokens is exactly 1, for {PERSISTS} versions: two engines never "
        f"agree so, and behavior log-probs must have come in the proximal's place, or the learner's own in the "
        f"behavior's; see that the engine reports its own log-probs and that nothing fills in missing ones",
    )


def fallback(lines: Sequence[Line], ease: float = 1.0) -> Alert | None:  # noqa: ARG001  one token is one too many
    """Something stood in for old log-probs, or tokens were left out for want of a number."""
    counts: dict[str, int] = {}
    newest = lines[-PERSISTS:]
    for line in newest:
        for name, count in line.get("fallbacks", {}).items():
            counts[name] = counts.get(name, 0) + count
    if not any(counts.values()):
        return None
    told = ", ".join(f"{count} {FALLBACKS.get(name, name)}" for name, count in sorted(counts.items()) if count)
    return Alert(
        "fallback",
        "warning",
        float(sum(counts.values())),
        f"in the newest {len(newest)} versions, of the trained tokens {told}: look for missing or non-finite log-probs "
        f"in the learner's log, and at learner.proximal.missing",
    )


_RULES: Mapping[str, Callable[[Sequence[Line], float], Alert | None]] = {
    "mask_by_staleness": mask_by_staleness,
    "clip_idle": clip_idle,
    "discrepancy_by_staleness": discrepancy_by_staleness,
    "discrepancy_is_one": discrepancy_is_one,
    "fallback": fallback,
}
RULES = tuple(_RULES)


def _alike(line: Line, newest: Line) -> bool:
    return all(line.get(name) == newest.get(name) for name in ("kind", "objective"))


def _firm(found: StalenessSlope | None, ease: float) -> TypeGuard[StalenessSlope]:
    """Whether enough versions agree that there is a slope."""
    return found is not None and found.versions >= LEAST_VERSIONS and abs(found.errors) > ERRORS * ease


def _points(by_staleness: Mapping[str, Mapping[str, float]], key: str, *, over: str | None = None) -> list[Point]:
    """Of a line; stalenesses without the number are left out. Tokens that have no ratio, so that no mask or mean has
    judged them, do not count: a mean over none of them is written as 0."""
    points = []
    for staleness, values in by_staleness.items():
        value, whole = values.get(key), 1.0 if over is None else values.get(over)
        if value is not None and whole:
            judged = values["tokens"] - values.get("missing", 0.0) - values.get("nonfinite", 0.0)
            points.append(Point(float(staleness), judged, value / whole))
    return points


def _stale(line: Line) -> dict[str, float]:
    """Sums over the first minibatch's tokens that are not of the version trained."""
    sums = dict.fromkeys(("tokens", "clipped", "staleness", "total"), 0.0)
    for staleness, values in line["first_minibatch"].items():
        if int(staleness) > 0:
            tokens = values["tokens"]
            sums["tokens"] += tokens
            sums["clipped"] += tokens * values["clipped"]
            sums["staleness"] += tokens * values["log_staleness_ratio_abs"]
            sums["total"] += tokens * values["log_total_ratio_abs"]
    return sums


def _advice(lines: Sequence[Line]) -> str:
    kind = lines[-1].get("kind")
    if kind is None or kind in EXACT_KINDS:
        return (
            "the values in the proximal's place may not be of the tokens' versions; look at the workers' canary errors "
            "and at the learner's warnings of missing versions"
        )
    return f"the proximal is {kind}, a surrogate; take an exact learner.proximal.kind ({', '.join(EXACT_KINDS)})"
