"""Discrepancy rules for rows in float64 numpy, with products of ratios instead of sums of logs (algorithms.md 6, 9)."""

import itertools

import numpy as np

from tests.oracles.corrections import Array, Draw, Mask, estimate, ratio, token_weight

CLAMP = float(np.exp(20.0))


def ratios_of(data: Draw, row: int, places: list[int] | None = None) -> Array:
    """Unclamped ratios of the row's usable tokens; with `places`, of those at these places."""
    chosen = range(data.mask.shape[1]) if places is None else places
    return np.array(
        [np.exp(data.proximal[row, t] - data.behavior[row, t]) for t in chosen if data.usable[row, t]], dtype=np.float64
    )


def product(ratios: Array) -> float:
    """Product of the ratios, with its log clamped to +-20."""
    return float(np.clip(np.prod(ratios), 1 / CLAMP, CLAMP))


def geometric_mean(ratios: Array) -> float:
    return float(np.prod(ratios ** (1 / len(ratios)))) if len(ratios) else 1.0


def unbroken(mask_of_row: Mask) -> list[list[int]]:
    """Places of each contiguous run of trainable tokens."""
    places = itertools.groupby(range(len(mask_of_row)), key=lambda t: bool(mask_of_row[t]))
    return [list(run) for trainable, run in places if trainable]


def removed_rows(data: Draw, rule: str, bound: float | tuple[float, float]) -> Mask:
    """Tokens that the rule removes, [rows, tokens]; rule: veto, sequence, geometric, segment, k1_sequence_sum, ..."""
    removed = np.zeros(data.mask.shape, dtype=bool)
    for row in range(len(removed)):
        if rule == "segment":
            for places in unbroken(data.mask[row]):
                mean = geometric_mean(ratios_of(data, row, places))
                removed[row, places] = not bound[0] <= mean <= bound[1]
            continue
        removed[row, data.mask[row]] = fails(rule, ratios_of(data, row), bound)
    return removed


def fails(rule: str, ratios: Array, bound: float | tuple[float, float]) -> bool:
    """True if the rule removes a trajectory with these ratios."""
    if not len(ratios):
        return False
    match rule:
        case "veto":
            return bool((ratios < bound).any())
        case "sequence":
            return not bound[0] <= product(ratios) <= bound[1]
        case "geometric":
            return not bound[0] <= geometric_mean(ratios) <= bound[1]
    name, level = rule.split("_", 1)
    values = [estimate(name, ratio(np.log(r), 0.0)) for r in ratios]
    return {"sequence_sum": sum, "sequence_mean": np.mean, "sequence_max": max}[level](values) > bound


def sequence_weight(data: Draw, row: int, kind: str, low: float, high: float) -> float:
    """Weight of every kept token of the row, before normalization."""
    return token_weight(product(ratios_of(data, row)), kind, low, high)
