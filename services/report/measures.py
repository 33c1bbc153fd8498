"""Optional figures: measures of whole batches over versions, and comparisons of workers and lengths. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.services.report.aggregates import weighted_mean
from palimpsest.services.report.charts import BLUE, GRAY, GREEN, ORANGE, PURPLE, Figure, color, line, short
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import names

FEW = 30
"""Below this number of versions each one is marked: a line needs two neighbors that have a value."""
Read = Callable[[Line], float | None]


def of_batches(lines: Sequence[Line]) -> Figure | None:
    """Return divergences, perplexities, effective samples, entropy and gradient norm by version; None without them."""
    known = [held for held in lines if "all" in held and "ess_shares" in held]
    if not known:
        return None
    words = names(lines)
    panels: list[tuple[str, list[tuple[str, Read, str]]]] = [
        (
            f"{words.discrepancy}: KL estimates (nats)",
            [(k, _measure(f"discrepancy_{k}"), paint) for k, paint in (("k1", BLUE), ("k2", ORANGE), ("k3", GREEN))],
        ),
        (f"{words.discrepancy}: chi-square", [("chi-square", _measure("discrepancy_chi2"), PURPLE)]),
        (
            "perplexity",
            [
                ("perplexity, engine", _measure("behavior_perplexity"), BLUE),
                ("perplexity, learner", _measure("proximal_perplexity"), ORANGE),
            ],
        ),
        (
            "effective samples (share)",
            [
                ("tokens: total", _share("tokens_raw"), BLUE),
                ("tokens: used", _share("tokens_used"), GREEN),
                ("trajectories: total", _share("sequences_raw"), ORANGE),
                ("trajectories: used", _share("sequences_used"), PURPLE),
            ],
        ),
        ("entropy (nats)", [("entropy", _measure("entropy"), BLUE)]),
        ("gradient norm", [("gradient norm", lambda held: held.get("grad_norm"), GRAY)]),
    ]
    figure = make_subplots(rows=3, cols=2, shared_xaxes=True, vertical_spacing=0.1, horizontal_spacing=0.1)
    x = [held["published"] for held in known]
    for place, (title, curves) in enumerate(panels):
        row, column = 1 + place // 2, 1 + place % 2
        for name, read, paint in curves:
            mode = "lines+markers" if len(x) < FEW else "lines"
            trace = line(
                x, [read(held) for held in known], name, paint, width=1.5, mode=mode, showlegend=len(curves) > 1
            )
            trace.legend = f"legend{place + 1}" if place else "legend"
            figure.add_trace(trace, row=row, col=column)
        axes = figure.get_subplot(row, column)
        above = {"x": axes.xaxis.domain[0], "y": axes.yaxis.domain[1], "yanchor": "bottom", "orientation": "h"}
        figure.update_layout({f"legend{place + 1}" if place else "legend": above})
        figure.update_yaxes(title=title, row=row, col=column)
        if row == 3:
            figure.update_xaxes(title="version published", row=row, col=column)
    figure.update_yaxes(rangemode="tozero", row=2, col=2)
    figure.update_layout(height=780)
    return Figure(
        "Measures of each batch over versions",
        f"Estimates of the divergence between engine and learner from the {words.discrepancy} (k1 can be below 0); its "
        "chi-square; the perplexity of the batch under both; the effective samples as a share of all, of the total "
        "ratios (total) and of the weights that the loss uses (used); the entropy; the gradient norm before it is "
        "clipped. A version without a value has a gap. Signs of a fault: k3 or chi-square that rise over the run, "
        "perplexities that part, effective trajectories near 0, or an entropy that falls to 0.",
        figure,
        wide=True,
    )


def of_workers_and_lengths(lines: Sequence[Line]) -> Figure | None:
    """Return the discrepancy of each worker and the length of trajectories by staleness; None without both."""
    workers: dict[str, list[tuple[float | None, float]]] = {}
    lengths: dict[int, list[tuple[float | None, float]]] = {}
    for held in lines:
        for worker, own in held.get("by_worker", {}).items():
            workers.setdefault(worker, []).append((own["log_discrepancy_abs"], own["tokens"]))
        versions = held.get("versions", {})
        for age, length in versions.get("length", {}).items():
            lengths.setdefault(int(age), []).append((length, versions["oldest"][age]))
    if not workers and not lengths:
        return None
    words = names(lines)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    ages = sorted(lengths)
    bars: tuple[tuple[Sequence[Any], list[float | None], Any], ...] = (
        (sorted(workers), [weighted_mean(workers[worker]) for worker in sorted(workers)], BLUE),
        (ages, [weighted_mean(lengths[age]) for age in ages], [color(age) for age in ages]),
    )
    for column, (x, values, paint) in enumerate(bars, start=1):
        drawn = go.Bar(x=list(x), y=short(values), marker={"color": paint}, showlegend=False)
        figure.add_trace(drawn, row=1, col=column)
    figure.update_xaxes(title="worker", type="category", row=1, col=1)
    figure.update_yaxes(title=f"mean |log {words.discrepancy}| (nats)", row=1, col=1)
    figure.update_xaxes(title="staleness of the oldest token", dtick=1 if len(ages) < 16 else None, row=1, col=2)
    figure.update_yaxes(title="mean length (tokens)", row=1, col=2)
    figure.update_layout(height=360)
    return Figure(
        f"{words.discrepancy.capitalize()} by worker, length by staleness",
        "Left: the mean of each worker's tokens; each worker has its own engine. Right: the mean length of the trained "
        "trajectories, by the staleness of their oldest token. Signs of a fault: one worker far above the others (its "
        "engine computes something else), or lengths that fall with staleness (long trajectories are lost).",
        figure,
        wide=True,
    )


def _measure(name: str) -> Read:
    return lambda held: held["all"].get(name)


def _share(name: str) -> Read:
    return lambda held: held["ess_shares"].get(name)
