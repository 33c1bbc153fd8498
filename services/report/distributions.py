"""Figures that a run has only if its lines tell of it: how ratios are spread, and what a surrogate leaks."""

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.services.report.aggregates import WRONGS, leak
from palimpsest.services.report.charts import BLUE, GRAY, ORANGE, Figure, color, line, short
from palimpsest.services.report.folder import Line
from palimpsest.services.report.labels import names

EDGES = ("-2", "-1", "-.5", "-.2", "-.1", "-.05", "-.02", "-.01", ".01", ".02", ".05", ".1", ".2", ".5", "1", "2")
BINS = (f"< {EDGES[0]}", *(f"{low} to {high}" for low, high in pairwise(EDGES)), f"> {EDGES[-1]}")


def spreads(lines: Sequence[Line]) -> Figure | None:
    """Histograms of both log-ratios by staleness; None where nobody counted."""
    told = [line["ratios"] for line in lines if "ratios" in line]
    if not told:
        return None
    words = names(lines)
    titles = (f"log {words.discrepancy}", f"log {words.ratio}, first minibatch")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    for column, ratio in ((1, "discrepancy"), (2, "staleness_first")):
        counts: dict[int, list[int]] = {}
        for part in told:
            for age, spread in part[ratio].items():
                if age != "all":
                    before = counts.get(int(age), [0] * len(BINS))
                    counts[int(age)] = [a + b for a, b in zip(before, spread["bins"], strict=True)]
        for age in sorted(counts):
            shares = [100 * count / max(1, sum(counts[age])) for count in counts[age]]
            trace = line(BINS, shares, str(age), color(age), mode="lines+markers", showlegend=column == 1)
            trace.legendgroup = str(age)
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title=f"{titles[column - 1]} (nats)", row=1, col=column)
        figure.update_yaxes(title="share of tokens (%)", rangemode="tozero", row=1, col=column)
    figure.update_layout(height=400, legend={"title": {"text": "staleness"}})
    return Figure(
        f"How the log {words.discrepancy} and the log {words.ratio} are spread",
        "Shares of the run's tokens in bins of fixed edges, one curve for each staleness. The left curves should lie "
        "on one another, whatever their staleness; the right ones may widen with it. Alarming: left curves that widen "
        "with staleness, a heap in an outermost bin, or everything in the middle bin of the left (nothing to see "
        "between engine and learner usually means that nothing was looked at).",
        figure,
        wide=True,
    )


def leaks(lines: Sequence[Line]) -> Figure | None:
    """What the surrogate did wrong in audited versions; None when none was audited."""
    found = leak(lines)
    if found is None:
        return None
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    ages = found["by_staleness"]
    for name, paint, dash in (("rms", BLUE, "solid"), ("mean", ORANGE, "dash")):
        values = [part[name] for part in ages.values()]
        figure.add_trace(line(list(map(int, ages)), values, f"{name} of the leak", paint, dash=dash,
                              mode="lines+markers"), row=1, col=1)  # fmt: skip
    figure.update_xaxes(title="staleness (versions)", dtick=1 if len(ages) < 16 else None, row=1, col=1)
    figure.update_yaxes(title="log surrogate / old (nats)", row=1, col=1)
    judged = [name for name in WRONGS if found[name] is not None]
    bars = go.Bar(
        x=[name.replace("_", " ") for name in judged],
        y=short(100 * found[name] for name in judged),
        name="share of tokens",
        marker={"color": GRAY},
        showlegend=False,
    )
    figure.add_trace(bars, row=1, col=2)
    figure.update_xaxes(title="otherwise than with old log-probs", row=1, col=2)
    figure.update_yaxes(title="share of tokens (%)", rangemode="tozero", row=1, col=2)
    figure.update_layout(height=400)
    return Figure(
        "What the surrogate leaks, and what it judges wrongly",
        f"In {found['versions']} audited versions ({found['tokens']:,} tokens) the old log-probs were computed beside "
        "the surrogate's. Left: log surrogate / old, which is taken from one factor and given to the other; exact "
        "values would lie at 0. Right: tokens masked though their true discrepancy is inside the band, kept though it "
        "is outside, the same of the clip, and of both together: removed though neither is due, trained on though one "
        "is. Constraints that are off, or do not judge single tokens, are left out.",
        figure,
        wide=True,
    )
