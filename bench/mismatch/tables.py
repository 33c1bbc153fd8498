"""The tables of docs/results.md, from the measured numbers. Pure."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def tables(result: Result) -> dict[str, str]:
    """Return the Markdown of each table by name."""
    return {"passive": passive(result), "active": active(result), "thresholds": thresholds(result)}


def passive(result: Result) -> str:
    """Return the table of all references on the same tokens."""
    head = (
        "reference",
        "mask slope",
        "at one place",
        "clip slope",
        "clipped, first minibatch",
        "mean abs. leak",
        "correlation",
    )
    keys = (
        "mask_slope",
        "mask_slope_at_place",
        "clip_slope",
        "clip_first_minibatch",
        "leak",
        "discrepancy_correlation",
    )
    rows = [
        (f"`{name}`", *(_interval(each[key], 4 if "slope" in key else 3) for key in keys))
        for name, each in result["methods"].items()
        if each["leak"]["mean"] is not None
    ]
    return _table(head, rows)


def active(result: Result) -> str:
    """Return the table of trainings with each method, at the main thresholds."""
    head = (
        "method",
        "final reward",
        "minus exact",
        "all versions",
        "masked",
        "clipped",
        "resets",
        "tuned",
        "at",
        "CPU s",
        "CPU s, proximal",
    )
    rows = []
    for name, each in result["methods"].items():
        final, tuned = each["final_reward"], each["final_reward"]["tuned"]
        rows.append(
            (
                f"`{name}`",
                _interval(final, 3),
                "" if name == "exact" else _interval(final["less_exact"], 3),
                _interval(each["reward_over_run"], 3),
                f"{final['masked']:.3f}",
                f"{final['clipped']:.3f}",
                f"{final['resets']:.1f}",
                _interval(tuned, 3),
                f"c {tuned['c']}, ε {tuned['epsilon']:g}",
                f"{each['seconds']:.1f}",
                f"{each['proximal_seconds']:.2f}",
            )
        )
    return _table(head, rows)


def thresholds(result: Result) -> str:
    """Return the table of the final reward by c and by epsilon."""
    settings = result["settings"]
    main = settings["passive"]
    bands, clips = settings["c"], [f"{clip:g}" for clip in settings["epsilon"] if clip != main["epsilon"]]
    head = (
        "method",
        *(f"c {band}, ε {main['epsilon']:g}" for band in bands),
        *(f"c {main['c']:g}, ε {clip}" for clip in clips),
    )
    rows = [
        (
            f"`{name}`",
            *(_interval(each["final_reward"]["by_c"][band], 3) for band in bands),
            *(_interval(each["final_reward"]["by_epsilon"][clip], 3) for clip in clips),
        )
        for name, each in result["methods"].items()
    ]
    return _table(head, rows)


def _interval(interval: dict[str, float | None], digits: int) -> str:
    """Return a mean and its interval as text.

    >>> _interval({"mean": 0.5, "low": 0.4, "high": 0.61}, 2)
    '0.50 [0.40, 0.61]'
    """
    numbers = [interval[key] for key in ("mean", "low", "high")]
    if any(number is None for number in numbers):
        return "-"
    # + 0.0 removes the sign of a rounded zero
    mean, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in numbers if number is not None)
    return f"{mean} [{low}, {high}]" if mean != low or mean != high else mean


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
