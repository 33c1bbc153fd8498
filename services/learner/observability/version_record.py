"""One version's line for history.jsonl, the live view and the metrics. Pure.

docs/algorithms/metrics-and-alerts.md says what each number is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.common.messages import TrajectoryFinished
from palimpsest.common.trajectory import cuts
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.observability.effective_samples import capped_weights, effective_sample_sizes
from palimpsest.services.learner.observability.histograms import summarize_distribution
from palimpsest.services.learner.observability.removals import past_clip, removal, token_masked
from palimpsest.services.learner.observability.staleness_slope import Point, slope
from palimpsest.services.learner.observability.surrogate_error import Thresholds, surrogate_error_record
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.token_statistics import (
    LogRatios,
    Tokens,
    by_staleness,
    divergences,
    effective_sample_share,
    summary,
)
from palimpsest.services.learner.observability.token_table import TokenTable
from palimpsest.services.learner.training.results import StepResult

DIGITS = 5
"""Significant ones of what is written; counts are whole."""
OFF = Thresholds(band=None, clip_low=None, clip_high=None)
SLOPES = ("masked", "clipped")
"""Shares whose slope against staleness is told."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a version was trained on."""

    version: Version
    """At which it was trained."""
    published: Version
    """Which came of it."""
    records: list[TrajectoryFinished]
    groups: Sequence[Sequence[Row]]


def version_record(
    batch: Batch,
    trained: StepResult,
    *,
    seconds: float,
    phases: dict[str, float],
    learning_rate: float,
    counts: dict[str, Any],
    sampled_tokens: int,
    bounds: RunThresholds | None = None,
    fallbacks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The line: means over the batch's trajectories, and over its tokens by staleness.

    bounds: what the run compares ratios with; without them nothing is said of caps, of tokens past the clip and of
    wrong reasons. fallbacks: counts since the last line of what stood in silently, beside those of the batch's tokens.
    """
    flat = TokenTable.of(trained.micro_batches, batch.version)
    tokens, records = flat.tokens, batch.records
    spreads = [[row.reward for row in group] for group in batch.groups]
    line = {
        "version": batch.version,
        "published": batch.published,
        "seconds": round(seconds, 3),
        "phases": {phase: round(spent, 4) for phase, spent in phases.items()},
        "trajectories": counts,
        "sampled_tokens": sampled_tokens,
        "batch": len(records),
        "groups": _samples(records),
        "tokens": len(tokens.staleness),
        "length": sum(len(r.tokens) // 4 for r in records) / len(records),
        "reward": sum(r.reward for r in records) / len(records),
        "successes": "".join("1" if r.success else "0" for r in records),
        "even_groups": sum(max(rewards) == min(rewards) for rewards in spreads),
        "multi_version": sum(len({s.version for s in r.segments}) > 1 for r in records),
        "cuts": sum(len(cuts(r.segments)) for r in records),
        "exact": trained.exact,
        "proximal": trained.method,
        "kind": bounds.kind if bounds else trained.method,
        "objective": bounds.objective if bounds else None,
        "active_share": trained.active_share if trained.active_share == trained.active_share else None,
        "lr_factor": trained.lr_factor,
        "normalizer": trained.normalizer,
        "baseline": trained.baseline,
        "train_seconds": {what: round(spent, 4) for what, spent in trained.seconds.items()},
        "gauges": trained.gauges,
        "loss": trained.loss,
        "grad_norm": trained.grad_norm if trained.grad_norm == trained.grad_norm else None,
        "skipped": trained.skipped,
        "learning_rate": learning_rate,
        "ess": effective_sample_share(tokens),
        "staleness_max": int(tokens.staleness.max(initial=0)),
        "staleness_mean": float(tokens.staleness.mean()) if len(tokens.staleness) else 0.0,
    }
    told: dict[str, Any] = round_for_json(of_tokens(flat, bounds) | {"versions": of_versions(batch)})
    told["cost"] = round_for_json(_cost(trained.seconds, phases))
    told["missed"] = trained.missed
    told["fallbacks"] = _fallbacks(flat, bounds) | dict(fallbacks or {})
    return line | told | {"alerts": []}


def of_tokens(flat: TokenTable, bounds: RunThresholds | None) -> dict[str, Any]:
    """What is said of the batch's tokens, by staleness and as a whole."""
    tokens, thresholds = flat.tokens, bounds.thresholds if bounds else OFF
    first = tokens.where(flat.first)

    def apart(part: Tokens) -> dict[str, Any]:
        return summary(part) | divergences(part) | {"token_masked": token_masked(part)}

    def at_first(part: Tokens) -> dict[str, Any]:
        return summary(part) | {"past_clip": past_clip(part, thresholds)}

    aged = by_staleness(tokens, apart)
    weights = (tokens, flat.weight, flat.trajectory)
    return {
        "all": apart(tokens),
        "by_staleness": {str(s): values for s, values in aged.items()},
        "first_minibatch": {str(s): values for s, values in by_staleness(first, at_first).items()},
        "ratios": _ratios(tokens, flat.first),
        "slopes": {name: slope([Point(s, v["tokens"], v[name]) for s, v in aged.items()]) for name in SLOPES},
        "removal": removal(tokens, thresholds),
        "ess_shares": effective_sample_sizes(*weights, by_total=bounds is not None and bounds.objective == "minirl"),
        "caps": capped_weights(*weights, low=bounds.weight_low, high=bounds.weight_high, of_sequence=bounds.of_sequence)
        if bounds
        else None,
        "old": {
            "coverage": float(flat.exact.mean()) if len(flat.exact) else None,
            "known": float((~np.isnan(tokens.old)).mean()) if len(flat.exact) else None,
        },
        "leak": surrogate_error_record(flat, thresholds),
    }


def of_versions(batch: Batch) -> dict[str, Any]:
    """Which versions sampled the batch: of each trajectory how many, the staleness of the oldest token (staleness ->
    trajectories), and of each group the versions from the first to the last."""
    sampled = [[segment.version for segment in record.segments] for record in batch.records if record.segments]
    groups: dict[str, list[Version]] = {}
    for record in batch.records:
        groups.setdefault(record.group, []).extend(segment.version for segment in record.segments)
    counts = [len(set(versions)) for versions in sampled]
    spans = [max(versions) - min(versions) for versions in groups.values() if versions]
    oldest: dict[str, int] = {}
    for age in sorted(batch.version - min(versions) for versions in sampled):
        oldest[str(age)] = oldest.get(str(age), 0) + 1
    return {
        "per_trajectory_mean": sum(counts) / len(counts) if counts else None,
        "per_trajectory_max": max(counts, default=None),
        "group_span_mean": sum(spans) / len(spans) if spans else None,
        "group_span_max": max(spans, default=None),
        "oldest": oldest,
    }


def round_for_json(value: Any) -> Any:
    """The same with numbers short enough to be written down; what is not finite is None.

    >>> brief({"a": [0.123456789, float("nan")], "b": 1234567.0, "c": None})
    {'a': [0.12346, None], 'b': 1234567.0, 'c': None}
    """
    match value:
        case dict():
            return {key: round_for_json(inner) for key, inner in value.items()}
        case list():
            return [round_for_json(inner) for inner in value]
        case float():
            return (value if value.is_integer() else float(f"{value:.{DIGITS}g}")) if math.isfinite(value) else None
    return value


def _ratios(tokens: Tokens, first: np.ndarray) -> dict[str, Any]:
    """Name of a log-ratio -> "all" and each staleness -> how it is spread; the staleness ratio of the first minibatch
    and of those after it apart."""

    def spreads(part: Tokens, name: str) -> dict[str, Any]:
        told = {"all": summarize_distribution(getattr(LogRatios.of(part), name))}
        for staleness in np.unique(part.staleness):
            told[str(int(staleness))] = summarize_distribution(getattr(LogRatios.of(part.at(int(staleness))), name))
        return {staleness: values for staleness, values in told.items() if values is not None}

    ratios = {
        "discrepancy": spreads(tokens, "discrepancy"),
        "staleness_first": spreads(tokens.where(first), "staleness"),
        "total": spreads(tokens, "total"),
    }
    return ratios if first.all() else ratios | {"staleness_later": spreads(tokens.where(~first), "staleness")}


def _cost(parts: Mapping[str, float], phases: Mapping[str, float]) -> dict[str, float]:
    """Share of the training's time that each of its parts took; the rest is moving batches between ranks."""
    whole = max(phases.get("train", 0.0), sum(parts.values()))
    if not whole:
        return {}
    shares = {what: spent / whole for what, spent in parts.items()}
    return shares | {"rest": max(0.0, 1.0 - sum(shares.values()))}


def _fallbacks(flat: TokenTable, bounds: RunThresholds | None) -> dict[str, int]:
    """Tokens for which something stood in, or that were left out for want of a number; all 0 while nothing is wrong."""
    tokens = flat.tokens
    wanted = bounds is not None and bounds.exact
    return {
        "missing": int(tokens.missing.sum()),
        "surrogate": int((~flat.exact & ~tokens.missing).sum()) if wanted else 0,
        "nonfinite": int((~tokens.finite & ~tokens.missing).sum()),
    }


def _samples(records: Sequence[TrajectoryFinished]) -> dict[str, list[int]]:
    """Group -> which of its samples were trained on: the ids of the batch, short."""
    samples: dict[str, list[int]] = {}
    for record in records:
        samples.setdefault(record.group, []).append(int(record.trajectory.rpartition("/")[2]))
    return samples
