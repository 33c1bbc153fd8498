"""Figures of versions over time and of the learner's time."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.common.messages import VersionApplied
from palimpsest.services.report.charts import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, Figure, color, dots, line, short
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.learning import mark_changes, mark_starts
from palimpsest.services.report.summary import is_first_after_start

PHASES = (
    ("wait", "waiting for trajectories", GRAY),
    ("train", "training, old log-probs included", BLUE),
    ("report", "recording", PURPLE),
    ("publish", "publishing", GREEN),
    ("publish_wait", "waiting until a version is announced", RED),
    ("checkpoint", "checkpointing", ORANGE),
)


def timeline(lines: Sequence[Line], applied: Sequence[VersionApplied], tolerance: float | None) -> Figure:
    """Published versions, updates of the workers, and cuts."""
    figure = make_subplots(
        rows=4, cols=1, shared_xaxes=True, row_heights=[0.3, 0.26, 0.22, 0.22], vertical_spacing=0.04
    )
    minutes = [e["seconds"] / 60 for e in lines]
    published = {e["published"]: e["seconds"] / 60 for e in lines}
    versions = line(minutes, [e["published"] for e in lines], "published", BLUE, showlegend=False)
    versions.line.shape = "hv"
    figure.add_trace(versions, row=1, col=1)
    workers = list(dict.fromkeys(update.worker for update in applied))
    for i, worker in enumerate(workers):
        own = [update for update in applied if update.worker == worker and update.version in published]
        x = [published[update.version] for update in own]
        names = [f"version {update.version}" for update in own]
        for row, values in ((2, [1e3 * update.pause_s for update in own]), (3, [u.canary_error for u in own])):
            trace = dots(x, values, worker, color(i), text=names, showlegend=len(workers) > 1 and row == 2)
            trace.legendgroup = worker
            figure.add_trace(trace, row=row, col=1)
    if tolerance is not None:
        figure.add_hline(y=tolerance, line={"dash": "dash", "width": 1, "color": RED}, row=3, col=1)
    figure.add_trace(
        go.Bar(x=minutes, y=[e["cuts"] for e in lines], name="cuts", marker={"color": ORANGE}, showlegend=False),
        row=4, col=1,
    )  # fmt: skip
    mark_starts(figure, lines)
    mark_changes(figure, lines, minutes)
    titles = ("version", "pause (ms)", "canary (nats)", "cuts")
    for row, title in enumerate(titles, start=1):
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="running time of the learner (minutes)", row=4, col=1)
    figure.update_layout(height=680)
    return Figure(
        "Timeline of versions, updates and cuts",
        "From the top: published versions; the pause of a worker's sampling for each update; the canary error of the "
        "updated engine (dashed: the tolerance); and the number of version changes inside turns, by batch. Signs of a "
        "fault: a flat stretch at the top, pauses that grow, or a canary error that approaches the line.",
        figure,
        wide=True,
    )


def where_the_time_went(lines: Sequence[Line]) -> Figure:
    """The learner's seconds by phase."""
    figure = make_subplots(rows=2, cols=1, row_heights=[0.22, 0.78], vertical_spacing=0.2)
    starts = sum(e["phases"].get("wait", 0.0) for e in lines if is_first_after_start(e))
    steady = [e["phases"] | {"wait": 0.0} if is_first_after_start(e) else e["phases"] for e in lines]
    totals = [("until the first batch (engines start)", starts, RED)]
    totals += [(name, sum(e.get(phase, 0.0) for e in steady), paint) for phase, name, paint in PHASES]
    for name, seconds, paint in totals:
        total = go.Bar(
            y=[""], x=short([seconds]), name=name, orientation="h", marker={"color": paint}, legendgroup=name
        )
        figure.add_trace(total, row=1, col=1)
    x = [e["published"] for e in lines]
    for phase, name, paint in PHASES:
        # A version's line has the seconds of checkpoint and publish of the version before it.
        spent = steady if phase in ("wait", "train", "report") else [*steady[1:], {}][: len(steady)]
        bars = go.Bar(x=x, y=short(e.get(phase, 0.0) for e in spent), name=name, legendgroup=name, showlegend=False)
        bars.marker = {"color": paint, "line": {"width": 0}}
        figure.add_trace(bars, row=2, col=1)
    figure.update_layout(barmode="stack", bargap=0, height=480, legend={"traceorder": "normal"})
    figure.update_xaxes(title="seconds, entire run", row=1, col=1)
    figure.update_yaxes(showticklabels=False, row=1, col=1)
    figure.update_xaxes(title="version published", row=2, col=1)
    figure.update_yaxes(title="seconds for the version", row=2, col=1)
    return Figure(
        "Where the learner's time went",
        "Above: the run; below: each version, without the wait for the first batch after a start. If the learner "
        "mostly waits, add rollout workers; if it never waits, it is the bottleneck. Sign of a fault: publishing or "
        "checkpointing takes longer than training.",
        figure,
        wide=True,
    )
