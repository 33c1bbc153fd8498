"""Shared parts of the figures: colors, axes, rounding. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = "#3b82f6", "#f97316", "#10b981", "#ef4444", "#a855f7", "#94a3b8"
"""Legible on light and dark backgrounds."""
_AGES = ("#3b82f6", "#14b8a6", "#84cc16", "#eab308", "#f97316", "#ef4444", "#d946ef", "#8b5cf6")
WINDOW = 10
"""Number of versions of the moving means."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its title and explanation."""

    title: str
    explanation: str
    """What the figure shows, and which shapes indicate a fault."""
    drawing: go.Figure
    wide: bool = False


def color(staleness: int) -> str:
    """Return the color of a staleness; the same in every figure."""
    return _AGES[staleness % len(_AGES)]


def short(values: Iterable[float | None]) -> list[float | None]:
    """Return the values rounded to five digits, the precision of a screen.

    >>> short([0.123456789, None])
    [0.12346, None]
    """
    return [None if value is None else float(f"{value:.5g}") for value in values]


def moving_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of each value and its predecessors, over at most `window` values.

    >>> moving_mean([0.0, 1.0, 2.0], window=2)
    [0.0, 0.5, 1.5]
    """
    means = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(part) / len(part))
    return means


def line(x: Sequence[Any], y: Iterable[float | None], name: str, paint: str, **more: Any) -> go.Scatter:
    """Return a line; `more` goes to plotly."""
    look = {"color": paint, "width": more.pop("width", 2), "dash": more.pop("dash", "solid")}
    return go.Scatter(x=list(x), y=short(y), name=name, mode=more.pop("mode", "lines"), line=look, **more)


def dots(x: Sequence[Any], y: Iterable[float | None], name: str, paint: str, **more: Any) -> go.Scatter:
    """Return points; `more` goes to plotly."""
    look = {"color": paint, "size": more.pop("size", 5), "opacity": more.pop("opacity", 1.0)}
    return go.Scatter(x=list(x), y=short(y), name=name, mode="markers", marker=look, **more)


def log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """Return a logarithmic axis for the values, labeled at powers of ten, and at 2 and 5 times them if those are few.

    >>> log_axis([0.01, None, 0.04])["ticktext"]
    ['0.01', '0.02', '0.05', '0.1']
    >>> log_axis([1e-5, 2.0])["ticktext"]
    ['1e-05', '0.0001', '0.001', '0.01', '0.1', '1', '10']
    """
    positive = [value for value in values if value] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    factors = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [factor * 10.0**power for power in range(low, high) for factor in factors] + [10.0**high]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.6g}" for tick in ticks]}


def label_axes(figure: go.Figure, x: str, y: str, *, height: int = 340, **y_axis: Any) -> go.Figure:
    """Return the figure with titles on both axes; `y_axis` goes to plotly."""
    figure.update_layout(height=height)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, **y_axis)
    return figure
