"""The figures of docs/results.md, drawn from the measured numbers alone. Pure."""

from math import fsum  # rounds the same on every Python
from typing import Any

from bench.mismatch.svg import INK, Panel, document, legend

COLORS = {
    "exact": "#111827",
    "current_recompute": "#ef4444",
    "interp_prox_loglinear": "#f97316",
    "linear_prox": "#d4a106",
    "ewma_prox": "#a855f7",
    "ppo_ewma_async_off": "#3b82f6",
    "bypass": "#10b981",
}
"""References drawn by staleness."""
SHADES = ("#111827", "#3b82f6", "#f97316")
"""Of up to three values of a threshold."""
Result = dict[str, Any]


def drawings(result: Result) -> dict[str, str]:
    """File name without suffix -> SVG."""
    return {
        "mismatch-removed": removed(result),
        "mismatch-reward": reward(result),
        "mismatch-curves": curves(result),
        "mismatch-decay": decay(result),
    }


def removed(result: Result) -> str:
    """Masked and clipped share by staleness."""
    methods = result["methods"]
    window = result["settings"]["toy"]["window"]
    panels = []
    for i, (key, title) in enumerate(
        (("mask_by_staleness", "masked share of tokens"), ("clip_by_staleness", "clipped share of tokens"))
    ):
        curves = {name: [interval["mean"] for interval in methods[name][key]] for name in COLORS}
        top = _above(max(max(curve) for curve in curves.values()))
        panel = Panel(60 + i * 440, 40, 370, 250, x=(0, window), y=(0, top))
        panel.title(title)
        panel.x_axis(range(window + 1), "staleness (versions)")
        panel.y_axis(_ticks(top))
        for name, curve in curves.items():
            # exact and bypass mostly lie on each other; the dashes let both be seen
            panel.curve(list(enumerate(curve)), COLORS[name], dash="5 4" if name == "bypass" else "")
        panels.append(panel)
    names = list(COLORS.items())
    keys = legend(names[:4], left=60, top=356, step=190) + legend(names[4:], left=60, top=378, step=190)
    return document(panels, keys, width=900, height=392, title="Masked and clipped share of tokens by staleness")


def reward(result: Result) -> str:
    """Final reward of each method, over c and over epsilon."""
    methods = result["methods"]
    final = {name: methods[name]["final_reward"] for name in methods}
    intervals = [each for own in final.values() for by in ("by_c", "by_epsilon") for each in own[by].values()]
    low, high = min(each["low"] for each in intervals), max(each["high"] for each in intervals)
    edges = (_below(low), _above(high))
    panels, keys = [], []
    for i, (by, symbol) in enumerate((("by_c", "c"), ("by_epsilon", "ε"))):
        panel = Panel(190 + i * 365, 60, 315, 30 * len(methods), x=edges, y=(len(methods), 0))
        panel.title("mean reward of the last versions, over " + symbol)
        panel.x_axis(_ticks(edges[1], edges[0]), "reward")
        reference = final["exact"]["mean"]
        panel.rule((reference, 0), (reference, len(methods)), INK)
        for row, name in enumerate(methods):
            if i == 0:
                panel.text(panel.left - 8, panel.at(low, row + 0.5)[1] + 4, name, anchor="end")
            for k, each in enumerate(final[name][by].values()):
                y = row + 0.5 + 0.22 * (k - (len(final[name][by]) - 1) / 2)
                panel.whisker((each["mean"], y), (each["low"], y), (each["high"], y), SHADES[k])
        values = final["exact"][by]
        entries = [(f"{symbol} = {value}", shade) for value, shade in zip(values, SHADES, strict=False)]
        keys += legend(entries, left=panel.left, top=28, step=90)
        panels.append(panel)
    bottom = 60 + 30 * len(methods)
    return document(panels, keys, width=900, height=bottom + 50, title="Final reward of each method by thresholds")


def curves(result: Result) -> str:
    """Reward over the versions, as moving means."""
    means = {name: _moving(result["methods"][name]["reward_by_version"]) for name in COLORS}
    versions = len(means["exact"])
    top = _above(max(max(curve) for curve in means.values()))
    stride = max(1, versions // 10)
    panel = Panel(60, 40, 560, 300, x=(0, versions), y=(0, top))
    panel.title(f"mean reward, over the newest {MOVING} versions")
    panel.x_axis(range(0, versions + 1, stride), "version")
    panel.y_axis(_ticks(top))
    for name, curve in means.items():
        panel.curve(list(enumerate(curve)), COLORS[name], dots=False, dash="5 4" if name == "bypass" else "")
    names = list(COLORS.items())
    keys = legend(names[:3], left=60, top=404, step=190) + legend(names[3:6], left=60, top=426, step=190)
    keys += legend(names[6:], left=60, top=448, step=190)
    return document([panel], keys, width=650, height=462, title="Reward over the versions")


def decay(result: Result) -> str:
    """Mean leak of moving averages over their decay."""
    averages = result["leak_by_decay"]
    top = _above(max(each["high"] for each in averages))
    panel = Panel(60, 40, 380, 220, x=(0, 1), y=(0, top))
    panel.title("mean |leak| of a moving average (nats)")
    panel.x_axis((0, 0.2, 0.4, 0.6, 0.8, 1), "decay β")
    panel.y_axis(_ticks(top))
    window = result["settings"]["toy"]["window"]
    rule = window / (window + 2)
    panel.rule((rule, 0), (rule, top), "#3b82f6")
    panel.curve([(each["decay"], each["mean"]) for each in averages], INK)
    for each in averages:
        x = each["decay"]
        panel.whisker((x, each["mean"]), (x, each["low"]), (x, each["high"]), INK)
    note = legend([(f"β = W / (W + 2) = {rule:.2g} for W = {window}", "#3b82f6")], left=60, top=320, step=0)
    return document([panel], note, width=470, height=336, title="Leak of a moving average by its decay")


MOVING = 10
STEP = 0.05
"""Between grid lines, in every figure."""


def _moving(values: list[float]) -> list[float]:
    return [fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - MOVING) : i + 1])]


def _above(value: float) -> float:
    return STEP * (int(value / STEP) + 1)


def _below(value: float) -> float:
    return STEP * int(value / STEP)


def _ticks(top: float, bottom: float = 0.0) -> list[float]:
    count = round((top - bottom) / STEP)
    stride = 1 if count <= 8 else 2
    return [round(bottom + i * STEP, 10) for i in range(0, count + 1, stride)]
