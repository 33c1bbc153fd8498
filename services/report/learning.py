"""Figures of reward and success."""

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go

from palimpsest.services.report.charts import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    WINDOW,
    Figure,
    dots,
    label_axes,
    line,
    moving_mean,
)
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.summary import is_first_after_start


def over_versions(lines: Sequence[Line]) -> Figure:
    """Reward and success of each batch."""
    x = [line["published"] for line in lines]
    figure = go.Figure()
    for name, values, paint in (("success", success(lines), GREEN), ("reward", [e["reward"] for e in lines], BLUE)):
        figure.add_trace(dots(x, values, f"{name}, each batch", paint, size=4, opacity=0.35, showlegend=False))
        figure.add_trace(line(x, moving_mean(values), f"{name}, mean of {WINDOW} versions", paint))
    mark_changes(figure, lines, x)
    return Figure(
        "Success and reward over versions",
        "Points: the mean over each batch's trajectories. Lines: the moving mean. Signs of a fault: a curve that falls "
        "and stays down, or reward that rises without success.",
        label_axes(figure, "version published", "mean over trajectories (0 to 1)", rangemode="tozero"),
    )


def over_time(lines: Sequence[Line]) -> Figure:
    """Success over the running time."""
    minutes = [line["seconds"] / 60 for line in lines]
    figure = go.Figure()
    figure.add_trace(dots(minutes, success(lines), "each batch", GREEN, size=4, opacity=0.35))
    figure.add_trace(line(minutes, moving_mean(success(lines)), f"mean of {WINDOW} versions", GREEN))
    mark_starts(figure, lines)
    mark_changes(figure, lines, minutes)
    return Figure(
        "Success against wall-clock",
        "Success over the learner's running time, including the start of the engines, without breaks between runs. A "
        "dashed line marks each resumption. A long gap between points means that the run made no progress.",
        label_axes(figure, "running time (minutes)", "success (share of trajectories)", rangemode="tozero"),
    )


def success(lines: Sequence[Line]) -> list[float]:
    """Return the share of each batch's trajectories that solved their task."""
    return [line["successes"].count("1") / line["batch"] for line in lines]


def mark_starts(figure: go.Figure, lines: Sequence[Line]) -> None:
    """Add a vertical line at each resumption of the run."""
    for before, after in pairwise(lines):
        if is_first_after_start(after):
            figure.add_vline(x=before["seconds"] / 60, line={"dash": "dash", "width": 1, "color": GRAY})


def mark_changes(figure: go.Figure, lines: Sequence[Line], x: Sequence[float]) -> None:
    """Add a dotted vertical line where the settings changed. x: place of each line."""
    for (before, after), place in zip(pairwise(lines), x[1:], strict=False):
        if after.get("settings", 0) != before.get("settings", 0):
            figure.add_vline(x=place, line={"dash": "dot", "width": 1, "color": ORANGE})
