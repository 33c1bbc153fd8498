"""One version's line for history.jsonl, the live view and the metrics. Pure but for `observe`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import TrajectoryFinished
from common.trajectory import cuts
from common.versions import Version
from services.learner import metrics
from services.learner.batching import Row
from services.learner.scored import Trained
from services.learner.statistics import Tokens, by_staleness, effective_sample_share, summary


@dataclass(frozen=True, slots=True)
class Batch:
    """What a version was trained on."""

    version: Version
    """At which it was trained."""
    published: Version
    """Which came of it."""
    records: list[TrajectoryFinished]
    groups: Sequence[Sequence[Row]]


def describe(
    batch: Batch,
    trained: Trained,
    *,
    seconds: float,
    phases: dict[str, float],
    learning_rate: float,
    counts: dict[str, Any],
    sampled_tokens: int,
) -> dict[str, Any]:
    """The line: means over the batch's trajectories, and over its tokens by staleness."""
    tokens = Tokens.joined([scored.tokens(batch.version) for scored in trained.scored])
    first = [scored.tokens(batch.version) for scored in trained.scored if scored.first]
    records = batch.records
    spreads = [[row.reward for row in group] for group in batch.groups]
    return {
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
        "active_share": trained.active_share if trained.active_share == trained.active_share else None,
        "lr_factor": trained.lr_factor,
        "normaliser": trained.normaliser,
        "baseline": trained.baseline,
        "train_seconds": {what: round(spent, 4) for what, spent in trained.seconds.items()},
        "gauges": trained.gauges,
        "loss": trained.loss,
        "grad_norm": trained.grad_norm if trained.grad_norm == trained.grad_norm else None,
        "skipped": trained.skipped,
        "learning_rate": learning_rate,
        "ess": effective_sample_share(tokens),
        "all": summary(tokens),
        "by_staleness": {str(s): values for s, values in by_staleness(tokens).items()},
        "first_minibatch": {str(s): values for s, values in by_staleness(Tokens.joined(first)).items()},
        "staleness_max": int(tokens.staleness.max(initial=0)),
        "staleness_mean": float(tokens.staleness.mean()) if len(tokens.staleness) else 0.0,
    }


def _samples(records: Sequence[TrajectoryFinished]) -> dict[str, list[int]]:
    """Group -> which of its samples were trained on: the ids of the batch, short."""
    samples: dict[str, list[int]] = {}
    for record in records:
        samples.setdefault(record.group, []).append(int(record.trajectory.rpartition("/")[2]))
    return samples


def observe(line: dict[str, Any]) -> None:
    """Put the line into the metrics."""
    successes: str = line["successes"]
    metrics.TRAINED.inc(line["batch"])
    metrics.TOKENS.inc(line["tokens"])
    metrics.REWARD.set(line["reward"])
    metrics.SUCCESS.set(successes.count("1") / len(successes))
    metrics.PROXIMAL_EXACT.set(float(line["exact"]))
    metrics.PENDING.set(line["trajectories"]["pending"])
    metrics.SKIPPED.inc(line["skipped"])
    metrics.NONFINITE.inc(line["all"]["nonfinite"])
    if line["grad_norm"] is not None:
        metrics.GRAD_NORM.set(line["grad_norm"])
    for staleness, values in line["by_staleness"].items():
        metrics.LOG_DISCREPANCY.labels(staleness).set(values["log_discrepancy_abs"])
        metrics.LOG_STALENESS_RATIO.labels(staleness).set(values["log_staleness_ratio_abs"])
        metrics.MASKED.labels(staleness).set(values["masked"])
        metrics.CLIPPED.labels(staleness).set(values["clipped"])
        for _ in range(int(values["tokens"])):
            metrics.STALENESS.observe(int(staleness))
