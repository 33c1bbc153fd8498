"""The line of one version for history.jsonl, the live view and the metrics. Pure.

docs/algorithms/metrics-and-alerts.md defines each number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.common.branches import sequences, trajectory_of
from palimpsest.common.messages import Ending, TrajectoryFinished
from palimpsest.common.trajectory import cuts
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.buffer.token_fates import Fates
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
    whole_batch_measures,
)
from palimpsest.services.learner.observability.token_table import TokenTable
from palimpsest.services.learner.training.results import StepResult

DIGITS = 5
"""Significant digits of the floats in a line."""
OFF = Thresholds(band=None, clip_low=None, clip_high=None)
SLOPES = ("masked", "clipped")
"""Shares whose slope against staleness is in the line."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a version."""

    version: Version
    """The version trained at."""
    published: Version
    """The version that the training produced."""
    records: list[TrajectoryFinished]
    groups: Sequence[Sequence[Row]]
    stale: Sequence[TrajectoryFinished] = ()
    """Trajectories of the same groups without a token inside the staleness bound: only their rewards count."""
    lowest: int = 0
    """Lowest version inside the staleness bound. Tokens of lower versions are untrainable in their row."""

    def rewards(self) -> list[list[float]]:
        """Rewards of each group, in the order of the groups' first trajectories."""
        by_group: dict[str, list[float]] = {}
        for record in (*self.records, *self.stale):
            by_group.setdefault(record.group, []).append(record.reward)
        return list(by_group.values())

    def sequences(self) -> list[TrajectoryFinished]:
        """A record for each token sequence, branches included."""
        return [part for record in self.records for part in sequences(record)]

    def over_staleness(self) -> int:
        """Number of tokens of the trained trajectories that exceed the staleness bound."""
        return sum(len(s) for record in self.sequences() for s in record.segments if s.version < self.lowest)

    def versions(self, record: TrajectoryFinished) -> list[Version]:
        """Version of each segment inside the staleness bound, those of the branches included."""
        return [s.version for part in sequences(record) for s in part.segments if s.version >= self.lowest]


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
    oldest_live_s: float | None = None,
    skipped_even: Mapping[str, int] | None = None,
    token_fates: Fates | None = None,
    stored: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the line: means over the batch's trajectories, and over its tokens by staleness.

    bounds: thresholds of the run; without them the line has no caps, no tokens past the clip and no wrong removals.
    fallbacks: more counters for the field `fallbacks`, since the last line. skipped_even: groups left out because their
    rewards are equal, by environment, since the last line. token_fates: trained and lost tokens since the last line.
    stored: versions announced since the last line and their bytes; see StoredBytes.
    """
    flat = TokenTable.of(trained.micro_batches, batch.version)
    tokens, records = flat.tokens, batch.records
    even = _even_by_environment(batch, skipped_even or {})
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
        "masked_tokens": {"over_staleness": batch.over_staleness()},
        "length": sum(len(r.tokens) // 4 for r in batch.sequences()) / len(records),
        "reward": sum(r.reward for r in records) / len(records),
        "reward_deviation": round_for_json(float(np.std([record.reward for record in records]))),
        "successes": "".join("1" if r.success else "0" for r in records),
        "even_groups": sum(groups["kept"] for groups in even.values()),
        "token_fates": token_fates or {},
        "stored": dict(stored or {}),
        "even_by_environment": even,
        "by_environment": _by_environment(records),
        "truncated": sum(r.ending is Ending.TRUNCATED for r in records),
        "multi_version": sum(len({s.version for s in r.segments}) > 1 for r in records),
        "cuts": sum(len(cuts(r.segments)) for r in records),
        "exact": trained.exact,
        "proximal": trained.method,
        "kind": bounds.kind if bounds else trained.method,
        "objective": bounds.objective if bounds else None,
        "active_share": _known(trained.active_share),
        "lr_factor": _known(trained.lr_factor),
        "normalizer": trained.normalizer,
        "baseline": trained.baseline,
        "train_seconds": {what: round(spent, 4) for what, spent in trained.seconds.items()},
        "gauges": {name: _known(value) for name, value in trained.gauges.items()},
        "loss": _known(trained.loss),
        "grad_norm": _known(trained.grad_norm),
        "skipped": trained.skipped,
        "empty_minibatches": trained.empty,
        "learning_rate": learning_rate,
        "ess": _known(effective_sample_share(tokens)),
        "staleness_max": int(tokens.staleness.max()) if len(tokens.staleness) else None,
        "staleness_mean": float(tokens.staleness.mean()) if len(tokens.staleness) else None,
    }
    fields: dict[str, Any] = round_for_json(of_tokens(flat, bounds) | {"versions": of_versions(batch)})
    fields["cost"] = round_for_json(_cost(trained.seconds, phases))
    fields["by_worker"] = round_for_json(_by_worker(flat, trained, records))
    fields["oldest_live_s"] = None if oldest_live_s is None else round(oldest_live_s, 3)
    fields["missed"] = trained.missed
    fields["fallbacks"] = _fallbacks(flat, bounds) | dict(fallbacks or {})
    return line | fields | {"alerts": []}


def of_tokens(flat: TokenTable, bounds: RunThresholds | None) -> dict[str, Any]:
    """Return the fields about the batch's tokens, over all tokens and by staleness."""
    tokens, thresholds = flat.tokens, bounds.thresholds if bounds else OFF
    first = tokens.where(flat.first)

    def statistics(part: Tokens) -> dict[str, Any]:
        return summary(part) | divergences(part) | {"token_masked": token_masked(part)}

    def first_statistics(part: Tokens) -> dict[str, Any]:
        return summary(part) | {"past_clip": past_clip(part, thresholds)}

    grouped = by_staleness(tokens, statistics)
    weights = (tokens, flat.weight, flat.trajectory)
    return {
        "all": statistics(tokens) | whole_batch_measures(tokens),
        "by_staleness": {str(s): values for s, values in grouped.items()},
        "first_minibatch": {str(s): values for s, values in by_staleness(first, first_statistics).items()},
        "ratios": _ratios(tokens, flat.first),
        "slopes": {name: slope(_known_points(grouped, name)) for name in SLOPES},
        "removal": removal(tokens, thresholds),
        "ess_shares": effective_sample_sizes(
            *weights, by_total=bounds is not None and bounds.objective in ("minirl", "m2po")
        ),
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
    """Return the fields about the versions that sampled the trained tokens of the batch.

    `per_trajectory_*`: number of versions in a trajectory. `group_span_*`: newest minus oldest version of a group.
    `oldest`: staleness of the oldest token -> number of trajectories. `length`: the same -> mean number of tokens.
    """
    sampled = [versions for record in batch.records if (versions := batch.versions(record))]
    groups: dict[str, list[Version]] = {}
    for record in batch.records:
        groups.setdefault(record.group, []).extend(batch.versions(record))
    counts = [len(set(versions)) for versions in sampled]
    spans = [max(versions) - min(versions) for versions in groups.values() if versions]
    oldest: dict[str, int] = {}
    for age in sorted(batch.version - min(versions) for versions in sampled):
        oldest[str(age)] = oldest.get(str(age), 0) + 1
    lengths: dict[str, list[int]] = {age: [] for age in oldest}
    for record in batch.records:
        if versions := batch.versions(record):
            lengths[str(batch.version - min(versions))].append(len(record.tokens) // 4)  # int32
    return {
        "per_trajectory_mean": sum(counts) / len(counts) if counts else None,
        "per_trajectory_max": max(counts, default=None),
        "group_span_mean": sum(spans) / len(spans) if spans else None,
        "group_span_max": max(spans, default=None),
        "oldest": oldest,
        "length": {age: sum(counted) / len(counted) for age, counted in lengths.items()},
    }


def round_for_json(value: Any) -> Any:
    """Return the value with floats rounded to DIGITS significant digits, and None for floats that are not finite.

    >>> round_for_json({"a": [0.123456789, float("nan")], "b": 1234567.0, "c": None})
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


def _by_worker(flat: TokenTable, trained: StepResult, records: Sequence[TrajectoryFinished]) -> dict[str, Any]:
    """Worker, each with its own engine -> number of its tokens and mean |log discrepancy|."""
    worker_of = {record.trajectory: record.worker for record in records}
    names = [worker_of.get(trajectory_of(row.trajectory)) for part in trained.micro_batches for row in part.batch.rows]
    workers = np.array([name or "" for name in names], dtype=object)[flat.trajectory]
    measures = {}
    for worker in sorted({name for name in names if name}):
        values = summary(flat.tokens.where(workers == worker))
        measures[worker] = {name: values[name] for name in ("tokens", "log_discrepancy_abs")}
    return measures


def _known(value: float) -> float | None:
    """None for a value that is not finite: it is unknown."""
    return value if math.isfinite(value) else None


def _known_points(by_age: Mapping[int, Mapping[str, Any]], name: str) -> list[Point]:
    return [Point(age, values["tokens"], values[name]) for age, values in by_age.items() if math.isfinite(values[name])]


def _ratios(tokens: Tokens, first: np.ndarray) -> dict[str, Any]:
    """Return a dict: name of a log-ratio -> "all" and each staleness -> distribution.

    The staleness ratio has two entries: the first minibatch, and the later ones.
    """

    def spreads(part: Tokens, name: str) -> dict[str, Any]:
        distributions = {"all": summarize_distribution(getattr(LogRatios.of(part), name))}
        for staleness in np.unique(part.staleness):
            distributions[str(int(staleness))] = summarize_distribution(
                getattr(LogRatios.of(part.at(int(staleness))), name)
            )
        return {staleness: values for staleness, values in distributions.items() if values is not None}

    ratios = {
        "discrepancy": spreads(tokens, "discrepancy"),
        "staleness_first": spreads(tokens.where(first), "staleness"),
        "total": spreads(tokens, "total"),
    }
    return ratios if first.all() else ratios | {"staleness_later": spreads(tokens.where(~first), "staleness")}


def _even_by_environment(batch: Batch, skipped: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Environment -> groups whose rewards are all equal: `kept` in the batch, and `skipped`."""
    environments = {record.group: record.environment for record in (*batch.records, *batch.stale)}
    counts = {environment: {"kept": 0, "skipped": count} for environment, count in skipped.items()}
    for environment, rewards in zip(environments.values(), batch.rewards(), strict=True):
        even = counts.setdefault(environment, {"kept": 0, "skipped": 0})
        even["kept"] += max(rewards) == min(rewards)
    return dict(sorted(counts.items()))


def _by_environment(records: Sequence[TrajectoryFinished]) -> dict[str, dict[str, float]]:
    """Environment -> trajectories, groups and mean reward of the batch."""
    return {
        environment: {
            "trajectories": len(own),
            "groups": len({record.group for record in own}),
            "reward": sum(record.reward for record in own) / len(own),
        }
        for environment in sorted({record.environment for record in records})
        if (own := [record for record in records if record.environment == environment])
    }


def _cost(parts: Mapping[str, float], phases: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of the training time. `rest` is the time for moving batches between ranks."""
    total = max(phases.get("train", 0.0), sum(parts.values()))
    if not total:
        return {}
    shares = {what: spent / total for what, spent in parts.items()}
    return shares | {"rest": max(0.0, 1.0 - sum(shares.values()))}


def _fallbacks(flat: TokenTable, bounds: RunThresholds | None) -> dict[str, int]:
    """Return the counts of tokens with a replaced or missing log-prob. All are 0 in normal operation."""
    tokens = flat.tokens
    exact = bounds is not None and bounds.exact
    return {
        "missing": int(tokens.missing.sum()),
        "surrogate": int((~flat.exact & ~tokens.missing).sum()) if exact else 0,
        "nonfinite": int((~tokens.finite & ~tokens.missing).sum()),
    }


def _samples(records: Sequence[TrajectoryFinished]) -> dict[str, list[int]]:
    """Return a dict: group -> numbers of its samples in the batch."""
    samples: dict[str, list[int]] = {}
    for record in records:
        samples.setdefault(record.group, []).append(int(record.trajectory.rpartition("/")[2]))
    return samples
