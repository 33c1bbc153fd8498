"""Puts a version's line into the learner's Prometheus series."""

from collections.abc import Mapping
from typing import Any

from services.learner import metrics
from services.learner.distributions import EDGES, group

Line = dict[str, Any]
WRONG = (
    "masked_wrongly", "kept_wrongly", "clipped_wrongly", "unclipped_wrongly", "removed_wrongly", "trained_wrongly",
)  # fmt: skip


def observe(line: Line) -> None:
    """Once for each line. Alerts are alarm.py's."""
    _training(line)
    _tokens(line)
    _removal(line)
    _effective(line)
    _old(line)


def _training(line: Line) -> None:
    successes: str = line["successes"]
    metrics.TRAINED.inc(line["batch"])
    metrics.TOKENS.inc(line["tokens"])
    metrics.REWARD.set(line["reward"])
    metrics.SUCCESS.set(successes.count("1") / len(successes))
    metrics.PROXIMAL_EXACT.set(float(line["exact"]))
    metrics.PENDING.set(line["trajectories"]["pending"])
    metrics.SKIPPED.inc(line["skipped"])
    if line["grad_norm"] is not None:
        metrics.GRAD_NORM.set(line["grad_norm"])
    for what, value in line["gauges"].items():
        metrics.COMPANION.labels(what).set(value)
    for part, spent in line["train_seconds"].items():
        metrics.TRAIN_SECONDS.labels(part).inc(spent)


def _tokens(line: Line) -> None:
    metrics.NONFINITE.inc(line["all"]["nonfinite"])
    for gauge, key in (
        (metrics.LOG_DISCREPANCY, "log_discrepancy_abs"),
        (metrics.LOG_STALENESS_RATIO, "log_staleness_ratio_abs"),
        (metrics.MASKED, "masked"),
        (metrics.CLIPPED, "clipped"),
    ):
        _set_each(gauge, {staleness: values[key] for staleness, values in line["by_staleness"].items()})
    for staleness, values in line["by_staleness"].items():
        for _ in range(int(values["tokens"])):
            metrics.STALENESS.observe(int(staleness))
    for ratio, spreads in line["ratios"].items():
        for staleness, told in spreads.items():
            if staleness == "all":
                continue
            for above, count in zip(("-inf", *map(str, EDGES)), told["bins"], strict=True):
                metrics.LOG_RATIO_TOKENS.labels(ratio, group(int(staleness)), above).inc(count)


def _removal(line: Line) -> None:
    removal = line["removal"]
    for cause, (marginal, exclusive) in removal["causes"].items():
        metrics.REMOVED.labels(cause, "no").inc(marginal)
        metrics.REMOVED.labels(cause, "yes").inc(exclusive)
    if removal["tokens"]:
        metrics.ACTIVE.set(removal["active"] / removal["tokens"])
    _set(metrics.REMOVED_ADVANTAGE, removal["advantage"])
    for name, slope in line["slopes"].items():
        _set(metrics.SLOPE.labels(name), slope)


def _effective(line: Line) -> None:
    for name, share in line["ess_shares"].items():
        _set(metrics.EFFECTIVE.labels(*name.split("_")), share)
    for bound, count in (line["caps"] or {}).items():
        metrics.CAPPED.labels(bound).inc(count)
    metrics.LR_FACTOR.set(line["lr_factor"])
    metrics.NORMALISER.set(line["normaliser"])
    _set(metrics.GROUP_SPAN, line["versions"]["group_span_mean"])


def _old(line: Line) -> None:
    _set(metrics.OLD_COVERAGE, line["old"]["coverage"])
    for cause, count in line["fallbacks"].items():
        metrics.FALLBACKS.labels(cause).inc(count)
    leak = line["leak"]
    if leak is None:
        return
    _set_each(metrics.LEAK_RMS, {age: values["leak_rms"] for age, values in leak["by_staleness"].items()})
    for name in WRONG:
        _set(metrics.WRONG_REASON.labels(name), leak[name])


def _set_each(gauge: Any, values: Mapping[str, float | None]) -> None:
    """By staleness; one that an earlier batch had tokens of and this one has not is not known any more."""
    earlier = {sample.labels["staleness"] for metric in gauge.collect() for sample in metric.samples}
    for staleness in earlier | values.keys():
        _set(gauge.labels(staleness), values.get(staleness))


def _set(gauge: Any, value: float | None) -> None:
    """What nobody knows is NaN, not the last value."""
    gauge.set(float("nan") if value is None else value)
