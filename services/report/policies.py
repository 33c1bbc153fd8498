"""Figures of discrepancy and staleness ratio by staleness, and of masked and clipped tokens."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.services.report.aggregates import token_fates
from palimpsest.services.report.charts import (
    BLUE,
    ORANGE,
    PURPLE,
    Figure,
    color,
    dots,
    label_axes,
    line,
    log_axis,
    short,
)
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import EXACT, names
from palimpsest.services.report.summary import mean_by_staleness, tokens_by_staleness

STAND_IN = "with current weights"


def factors_by_staleness(lines: Sequence[Line]) -> Figure:
    """The key figure: the two factors of the total ratio against staleness."""
    words = names(lines)
    figure = make_subplots(
        rows=2, cols=2, row_heights=[0.74, 0.26], vertical_spacing=0.06, horizontal_spacing=0.1, shared_xaxes=True,
        specs=[[{}, {}], [{}, {}]],
    )  # fmt: skip
    discrepancy, entropy = mean_by_staleness(lines, "log_discrepancy_abs"), mean_by_staleness(lines, "entropy")
    instead = mean_by_staleness(lines, "log_total_ratio_abs", of="first_minibatch")
    first_entropy = mean_by_staleness(lines, "entropy", of="first_minibatch")
    look: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 7}}
    for name, values, paint, dash, width in (
        (f"{words.discrepancy} {words.discrepancy_symbol}", discrepancy, BLUE, "solid", 2),
        (
            f"{words.ratio} {words.ratio_symbol}",
            mean_by_staleness(lines, "log_staleness_ratio_abs"),
            ORANGE,
            "solid",
            6,
        ),
        (f"{words.discrepancy} {STAND_IN}", instead, PURPLE, "dash", 2),
    ):
        trace = line(ages(values), values.values(), name, paint, dash=dash, width=width, **look)
        trace.opacity = 0.6 if width > 2 else 1.0  # the dashed line covers this one
        figure.add_trace(trace, row=1, col=1)
    every: list[float] = []
    for name, values, per, paint, dash in (
        (f"{words.discrepancy} per nat", discrepancy, entropy, BLUE, "solid"),
        ("stand-in per nat", instead, first_entropy, PURPLE, "dash"),
    ):
        relative = {s: v / per[s] for s, v in values.items() if per.get(s)}
        every += relative.values()
        trace = line(ages(relative), relative.values(), name, paint, dash=dash, showlegend=False, **look)
        figure.add_trace(trace, row=1, col=2)
    tokens = tokens_by_staleness(lines)
    for column in (1, 2):
        bars = go.Bar(
            x=ages(tokens), y=list(tokens.values()), name="tokens", marker={"color": [color(a) for a in ages(tokens)]}
        )
        bars.showlegend = False
        figure.add_trace(bars, row=2, col=column)
        figure.update_xaxes(title="staleness (versions)", dtick=1 if len(tokens) < 16 else None, row=2, col=column)
        figure.update_yaxes(title="tokens", row=2, col=column)
    figure.update_yaxes(title="mean |log ratio| (nats)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="per nat of entropy (log scale)", row=1, col=2, **log_axis(every))
    figure.update_layout(height=480)
    meaning = (
        "With exact old log-probabilities, the discrepancy compares two engines at the same weights, so it must not "
        "grow with staleness. The staleness ratio contains the updates since then, so it may grow. "
        if words is EXACT
        else "A surrogate replaces the old policy (see the top of the page), so the factors are called correction and "
        "update: the correction contains a part of the staleness, which the update lacks. With old log-probabilities, "
        "the blue line would not depend on staleness. "
    )
    return Figure(
        f"{words.discrepancy.capitalize()} and {words.ratio} against staleness",
        meaning + "Left: means over the run's tokens. Right: divided by the entropy of the same tokens, because "
        "rounding matters more where the policy is undecided, and tokens of different staleness come from different "
        "parts of the run. Sign of a fault: a blue line on the right that climbs toward the dashed one; the values "
        "then do not belong to the tokens' versions.",
        figure,
        wide=True,
    )


def discrepancy_over_versions(lines: Sequence[Line]) -> Figure:
    """Curves of |log discrepancy|, one for each staleness."""
    figure, words = _curves(lines, "log_discrepancy_abs"), names(lines)
    x = [e["published"] for e in lines]
    instead = [_joined(e["first_minibatch"], "log_total_ratio_abs") for e in lines]
    trace = line(x, map(_positive, instead), STAND_IN, PURPLE, dash="dash", width=1.5, showlegend=False)
    figure.add_trace(trace)
    return Figure(
        f"|log {words.discrepancy}| over versions, per staleness",
        "Mean over each batch's tokens of one staleness; dashed: the values of current_recompute on the same data. "
        "Signs of a fault: curves of different staleness that stay apart, or a curve that rises over the run.",
        _over_versions(figure, f"mean {words.discrepancy_symbol} (nats)"),
    )


def staleness_ratio_over_versions(lines: Sequence[Line]) -> Figure:
    """Curves of |log staleness ratio|, one for each staleness."""
    words = names(lines)
    moved = (
        "the policy that sampled the token. It is 0 at staleness 0 in the first minibatch"
        if words is EXACT
        else "the surrogate"
    )
    return Figure(
        f"|log {words.ratio}| over versions, per staleness",
        f"The distance of the current policy from {moved}. Sign of a fault: a steady rise, which means that the "
        "learning rate or the staleness bound is too high.",
        _over_versions(_curves(lines, "log_staleness_ratio_abs"), f"mean {words.ratio_symbol} (nats)"),
    )


def removed_by_staleness(lines: Sequence[Line]) -> Figure:
    """Shares of tokens that mask and clip removed from the gradient."""
    figure = go.Figure()
    words = names(lines)
    for name, key, paint in (("masked", "masked", BLUE), ("clipped", "clipped", ORANGE)):
        shares = mean_by_staleness(lines, key)
        bars = go.Bar(x=ages(shares), y=short(100 * share for share in shares.values()), name=name)
        bars.marker = {"color": paint}
        figure.add_trace(bars)
    figure.update_layout(barmode="group")
    figure.update_xaxes(dtick=1 if len(tokens_by_staleness(lines)) < 16 else None)
    return Figure(
        "Masked and clipped tokens by staleness",
        f"The mask depends on the {words.discrepancy} and must not grow with staleness; the clip depends on the "
        f"{words.ratio} and should grow with it. Signs of a fault: a masked share that grows with staleness, or a "
        "clipped share of 0 at high staleness. Both indicate that other values replace the old policy.",
        label_axes(figure, "staleness (versions)", "share of tokens (%)", rangemode="tozero"),
    )


def staleness_over_versions(lines: Sequence[Line]) -> Figure:
    """Staleness of the trained tokens."""
    figure, x = go.Figure(), [e["published"] for e in lines]
    for age in map(int, tokens_by_staleness(lines)):
        shares = [100 * e["by_staleness"].get(str(age), {}).get("tokens", 0.0) / max(1, e["tokens"]) for e in lines]
        bars = go.Bar(x=x, y=short(shares), name=str(age), marker={"color": color(age), "line": {"width": 0}})
        figure.add_trace(bars)
    figure.update_layout(barmode="stack", bargap=0, legend={"title": {"text": "staleness"}, "traceorder": "normal"})
    return Figure(
        "Staleness of the trained tokens over versions",
        "Shares of each batch's tokens by the number of versions published since their sampling. Sign of a fault: all "
        "tokens at the bound (learner.max_staleness) together with drops, which means that rollout is faster than the "
        "learner.",
        label_axes(figure, "version published", "share of tokens (%)", range=[0, 100]),
    )


def fates_by_duration(lines: Sequence[Line]) -> Figure:
    """Trained and lost tokens by the duration and the length of their trajectory."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    sums = token_fates(lines)
    for column, (by, title) in enumerate(
        (("seconds", "duration, from (seconds)"), ("length", "length, from (tokens)")), start=1
    ):
        bins = sums.get(by, {})
        for fate, paint in (("trained", BLUE), ("lost", ORANGE)):
            totals = [sum(counts.values()) for counts in bins.values()]
            shares = [100 * counts[fate] / total for counts, total in zip(bins.values(), totals, strict=True)]
            bars = go.Bar(x=list(bins), y=short(shares), name=fate, marker={"color": paint}, showlegend=column == 1)
            bars.customdata = totals
            bars.hovertemplate = "%{y:.1f} % of %{customdata} tokens"
            figure.add_trace(bars, row=1, col=column)
        figure.update_xaxes(title=title, type="category", row=1, col=column)
    figure.update_yaxes(title="share of tokens (%)", range=[0, 100])
    figure.update_layout(barmode="stack", height=360)
    return Figure(
        "Trained and lost tokens by duration and length",
        "Tokens of finished trajectories by the time from the offer to the arrival, and by the number of sampled "
        "tokens; each bin ends where the next begins. Lost tokens exceeded learner.max_staleness. Sign of a fault: the "
        "lost share grows towards slow or long trajectories, so that the run learns less from them.",
        figure,
    )


def ages(values: dict[str, Any]) -> list[int]:
    """Return the stalenesses as numbers."""
    return [int(age) for age in values]


def _curves(lines: Sequence[Line], key: str) -> go.Figure:
    figure = go.Figure()
    for age in ages(tokens_by_staleness(lines)):
        batches = [e for e in lines if str(age) in e["by_staleness"]]
        values = [_positive(e["by_staleness"][str(age)][key]) for e in batches]
        if any(values):
            figure.add_trace(dots([e["published"] for e in batches], values, str(age), color(age), opacity=0.8))
    figure.update_layout(legend={"title": {"text": "staleness"}})
    return figure


def _over_versions(figure: go.Figure, y: str) -> go.Figure:
    heights = [value for trace in figure.data for value in trace.y]
    return label_axes(figure, "version published", y, **log_axis(heights))


def _joined(by_staleness: dict[str, dict[str, float | None]], key: str) -> float | None:
    """Return the mean over the tokens of all stalenesses that have a value; None if none has."""
    known = [(values["tokens"] or 0.0, value) for values in by_staleness.values() if (value := values[key]) is not None]
    tokens = sum(count for count, _ in known)
    return sum(count * value for count, value in known) / tokens if tokens else None


def _positive(value: float | None) -> float | None:
    """Return None for 0, which a logarithmic axis cannot show, and for an unknown value."""
    return value if value is not None and value > 0 else None
