"""The figures of docs/results.md, drawn with matplotlib from the published numbers."""

import io
from collections.abc import Callable, Iterable, Sequence
from math import fsum  # rounds the same on every Python
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

COLORS = {
    "exact": "#111827",
    "current_recompute": "#ef4444",
    "interp_prox_loglinear": "#f97316",
    "linear_prox": "#d4a106",
    "ewma_prox": "#a855f7",
    "ppo_ewma_async_off": "#3b82f6",
    "bypass": "#10b981",
}
"""References in the figures by staleness."""
SHADES = ("#111827", "#3b82f6", "#f97316")
"""Colors of up to three values of a threshold."""
MOVING = 10
"""Versions in a moving mean of the reward."""
INK, GRID = "#1f2937", "#e5e7eb"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # a reader needs no font
    "svg.hashsalt": "palimpsest",  # fixed element ids
    "font.family": "DejaVu Sans",  # matplotlib contains this font
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
Result = dict[str, Any]


def figures(result: Result) -> dict[str, Figure]:
    """Return the figures by file name without suffix."""
    makers: dict[str, Callable[[Result], Figure]] = {
        "mismatch-removed": removed,
        "mismatch-reward": reward,
        "mismatch-curves": curves,
        "mismatch-decay": decay,
    }
    with mpl.rc_context(STYLE):
        return {name: make(result) for name, make in makers.items()}


def drawings(result: Result) -> dict[str, str]:
    """Return the SVG text of each figure by file name without suffix. The same numbers give the same text."""
    return {name: _svg(figure) for name, figure in figures(result).items()}


def removed(result: Result) -> Figure:
    """Masked and clipped share of tokens by staleness."""
    figure = _figure(9.0, 3.9)
    titles = {"mask_by_staleness": "masked share of tokens", "clip_by_staleness": "clipped share of tokens"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axes.set(title=title, xlabel="staleness (versions)")
        axes.xaxis.set_major_locator(MultipleLocator(1))
        for name in COLORS:
            _curve(axes, name, [interval["mean"] for interval in result["methods"][name][key]], marker="o")
        axes.set_ylim(bottom=0)
    _legend_below(figure, 4)
    return figure


def reward(result: Result) -> Figure:
    """Final reward of each method, by c and by epsilon. Points are means, bars are intervals over seeds."""
    final = {name: method["final_reward"] for name, method in result["methods"].items()}
    figure = _figure(9.0, 1.1 + 0.36 * len(final))
    for axes, (key, symbol) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), (("by_c", "c"), ("by_epsilon", "ε")), strict=True
    ):
        axes.axvline(final["exact"]["mean"], color=INK, linestyle="--", linewidth=1)
        values = list(final["exact"][key])
        for k, (value, color) in enumerate(zip(values, SHADES, strict=False)):
            places = [row + 0.22 * (k - (len(values) - 1) / 2) for row in range(len(final))]
            _intervals(
                axes, [own[key][value] for own in final.values()], places, color, label=f"{symbol} = {_number(value)}"
            )
        axes.set(title=f"mean reward of the last versions, by {symbol}", xlabel="reward")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, -0.23), ncols=3, borderaxespad=0)
    axes.set_yticks(range(len(final)), list(final))
    axes.invert_yaxis()
    return figure


def curves(result: Result) -> Figure:
    """Reward over the versions, as moving means."""
    figure = _figure(6.5, 4.6)
    axes = figure.subplots()
    axes.set(title=f"mean reward, over the newest {MOVING} versions", xlabel="version")
    for name in COLORS:
        _curve(axes, name, moving_means(result["methods"][name]["reward_by_version"]))
    axes.set_ylim(bottom=0)
    _legend_below(figure, 3)
    return figure


def decay(result: Result) -> Figure:
    """Mean leak of moving averages by decay."""
    averages, window = result["leak_by_decay"], result["settings"]["toy"]["window"]
    figure = _figure(4.7, 3.4)
    axes = figure.subplots()
    rule = window / (window + 2)
    axes.axvline(
        rule, color="#3b82f6", linestyle="--", linewidth=1, label=f"β = W / (W + 2) = {rule:.2g} for W = {window}"
    )
    axes.errorbar(
        [each["decay"] for each in averages],
        [each["mean"] for each in averages],
        yerr=_errors(averages),
        color=INK,
        marker="o",
    )
    axes.set(title="mean |leak| of a moving average (nats)", xlabel="decay β", xlim=(-0.03, 1.03))
    axes.set_ylim(bottom=0)
    _legend_below(figure, 1)
    return figure


def moving_means(values: Sequence[float]) -> list[float]:
    """Return the mean of the newest MOVING values at each version.

    >>> moving_means([1.0, 3.0])
    [1.0, 2.0]
    """
    return [fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - MOVING) : i + 1])]


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure; inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _curve(axes: Axes, name: str, values: Sequence[float], *, marker: str = "") -> None:
    """Draw values at 0, 1, ...; bypass is dashed, because it mostly coincides with exact."""
    style = "--" if name == "bypass" else "-"
    axes.plot(range(len(values)), values, color=COLORS[name], linestyle=style, marker=marker, label=name)


def _intervals(axes: Axes, each: Sequence[Result], places: Sequence[float], color: str, *, label: str) -> None:
    means = [interval["mean"] for interval in each]
    axes.errorbar(means, places, xerr=_errors(each), color=color, fmt="o", label=label)


def _errors(intervals: Iterable[Result]) -> list[list[float]]:
    """Return the distances from the mean to both ends of each interval. [2, intervals]"""
    both = [(each["mean"] - each["low"], each["high"] - each["mean"]) for each in intervals]
    return [[below for below, _ in both], [above for _, above in both]]


def _legend_below(figure: Figure, columns: int) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _number(text: str) -> str:
    return "∞" if text == "inf" else text


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())
