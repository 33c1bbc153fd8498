"""Optional figures: the distributions of the ratios, and the surrogate error."""

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.services.report.aggregates import WRONGS, leak
from palimpsest.services.report.charts import BLUE, GRAY, ORANGE, Figure, color, line, short
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import names

EDGES = ("-2", "-1", "-.5", "-.2", "-.1", "-.05", "-.02", "-.01", ".01", ".02", ".05", ".1", ".2", ".5", "1", "2")
BINS = (f"< {EDGES[0]}", *(f"{low} to {high}" for low, high in pairwise(EDGES)), f"> {EDGES[-1]}")


def spreads(lines: Sequence[Line]) -> Figure | None:
    """Return histograms of both log-ratios by staleness; None if no line has them."""
    counted = [line["ratios"] for line in lines if "ratios" in line]
    if not counted:
        return None
    words = names(lines)
    titles = (f"log {words.discrepancy}", f"log {words.ratio}, first minibatch")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    for column, ratio in ((1, "discrepancy"), (2, "staleness_first")):
        counts: dict[int, list[int]] = {}
        for part in counted:
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
        f"Distributions of the log {words.discrepancy} and the log {words.ratio}",
        "Shares of the run's tokens in bins with fixed edges, one curve for each staleness. The left curves should "
        "coincide for all stalenesses; the right curves may widen with it. Signs of a fault: left curves that widen "
        "with staleness, many tokens in an outermost bin, or all tokens in the middle bin on the left (no difference "
        "between engine and learner usually means that none was measured).",
        figure,
        wide=True,
    )


def leaks(lines: Sequence[Line]) -> Figure | None:
    """Return the surrogate error in audited versions; None without audited versions."""
    found = leak(lines)
    if found is None:
        return None
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    ages = found["by_staleness"]
    for name, paint, dash in (("rms", BLUE, "solid"), ("mean", ORANGE, "dash")):
        values = [part[name] for part in ages.values()]
        figure.add_trace(line(list(map(int, ages)), values, f"{name} of the surrogate error", paint, dash=dash,
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
    figure.update_xaxes(title="different than with old log-probs", row=1, col=2)
    figure.update_yaxes(title="share of tokens (%)", rangemode="tozero", row=1, col=2)
    figure.update_layout(height=400)
    return Figure(
        "Surrogate error, and tokens that it masks or clips wrongly",
        f"In {found['versions']} audited versions ({found['tokens']:,} tokens) the old log-probs were computed beside "
        "the surrogate's. Left: log surrogate / old, the error that moves from one factor to the other; it is 0 for "
        "exact values. Right: tokens that are masked although their true discrepancy is inside the band, kept although "
        "it is outside, the same for the clip, and for both together: removed although no constraint applies, trained "
        "on although one does. Constraints that are off, or that do not apply to single tokens, are omitted.",
        figure,
        wide=True,
    )
