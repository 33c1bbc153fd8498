"""Exports a version's line to the learner's Prometheus series."""

from collections.abc import Mapping
from typing import Any

from palimpsest.services.learner import instruments
from palimpsest.services.learner.observability.histograms import EDGES, group
from palimpsest.services.learner.observability.token_statistics import MEASURES

Line = dict[str, Any]
WRONG = (
    "masked_wrongly", "kept_wrongly", "clipped_wrongly", "unclipped_wrongly", "removed_wrongly", "trained_wrongly",
)  # fmt: skip


def export_to_prometheus(line: Line) -> None:
    """Update the series from a line. Call it once for each line. alerts.py exports the alerts."""
    _export_training(line)
    _export_tokens(line)
    _export_measures(line)
    _export_removal(line)
    _export_effective(line)
    _export_old_logprobs(line)


def _export_training(line: Line) -> None:
    successes: str = line["successes"]
    instruments.TRAINED.inc(line["batch"])
    instruments.TOKENS.inc(line["tokens"])
    instruments.TOO_OLD_TOKENS.inc(line["masked_tokens"]["over_staleness"])
    for by, bins in line["token_fates"].items():
        for above, counts in bins.items():
            for fate, tokens in zip(("trained", "lost"), counts, strict=True):
                instruments.TOKEN_FATES.labels(by, above, fate).inc(tokens)
    for environment, fates in line["even_by_environment"].items():
        for fate, groups in fates.items():
            instruments.EVEN_GROUPS.labels(environment, fate).inc(groups)
    instruments.ENVIRONMENT_REWARD.clear()
    for environment, values in line["by_environment"].items():
        instruments.ENVIRONMENT_REWARD.labels(environment).set(values["reward"])
        instruments.TRAINED_GROUPS.labels(environment).inc(values["groups"])
    instruments.TRUNCATED.set(line["truncated"] / line["batch"])
    instruments.LEARNING_RATE.set(line["learning_rate"])
    _set(instruments.ENTROPY, line["all"]["entropy"])
    instruments.REWARD.set(line["reward"])
    instruments.SUCCESS.set(successes.count("1") / len(successes))
    instruments.PROXIMAL_EXACT.set(float(line["exact"]))
    instruments.PENDING.set(line["trajectories"]["pending"])
    instruments.SKIPPED.inc(line["skipped"])
    instruments.EMPTY.inc(line["empty_minibatches"])
    if line["grad_norm"] is not None:
        instruments.GRAD_NORM.set(line["grad_norm"])
    for what, value in line["gauges"].items():
        _set(instruments.COMPANION.labels(what), value)
    for part, spent in line["train_seconds"].items():
        instruments.TRAIN_SECONDS.labels(part).inc(spent)


def _export_tokens(line: Line) -> None:
    instruments.NONFINITE.inc(line["all"]["nonfinite"])
    for gauge, key in (
        (instruments.LOG_DISCREPANCY, "log_discrepancy_abs"),
        (instruments.LOG_STALENESS_RATIO, "log_staleness_ratio_abs"),
        (instruments.MASKED, "masked"),
        (instruments.CLIPPED, "clipped"),
    ):
        _set_each(gauge, {staleness: values[key] for staleness, values in line["by_staleness"].items()})
    for staleness, values in line["by_staleness"].items():
        for _ in range(int(values["tokens"])):
            instruments.STALENESS.observe(int(staleness))
    for ratio, spreads in line["ratios"].items():
        for staleness, spread in spreads.items():
            if staleness == "all":
                continue
            for above, count in zip(("-inf", *map(str, EDGES)), spread["bins"], strict=True):
                instruments.LOG_RATIO_TOKENS.labels(ratio, group(int(staleness)), above).inc(count)


def _export_measures(line: Line) -> None:
    for what in MEASURES:
        _set(instruments.BATCH.labels(what), line["all"][what])
    instruments.WORKER_LOG_DISCREPANCY.clear()
    for worker, values in line["by_worker"].items():
        _set(instruments.WORKER_LOG_DISCREPANCY.labels(worker), values["log_discrepancy_abs"])
    _set_each(instruments.LENGTH, line["versions"]["length"])


def _export_removal(line: Line) -> None:
    removal = line["removal"]
    for cause, (marginal, exclusive) in removal["causes"].items():
        instruments.REMOVED.labels(cause, "no").inc(marginal)
        instruments.REMOVED.labels(cause, "yes").inc(exclusive)
    if removal["tokens"]:
        instruments.ACTIVE.set(removal["active"] / removal["tokens"])
    _set(instruments.REMOVED_ADVANTAGE, removal["advantage"])
    for name, slope in line["slopes"].items():
        _set(instruments.SLOPE.labels(name), slope)


def _export_effective(line: Line) -> None:
    for name, share in line["ess_shares"].items():
        _set(instruments.EFFECTIVE.labels(*name.split("_")), share)
    for bound, count in (line["caps"] or {}).items():
        instruments.CAPPED.labels(bound).inc(count)
    _set(instruments.LR_FACTOR, line["lr_factor"])
    instruments.NORMALIZER.set(line["normalizer"])
    _set(instruments.GROUP_SPAN, line["versions"]["group_span_mean"])


def _export_old_logprobs(line: Line) -> None:
    _set(instruments.OLD_COVERAGE, line["old"]["coverage"])
    for cause, count in line["fallbacks"].items():
        instruments.FALLBACKS.labels(cause).inc(count)
    leak = line["leak"]
    if leak is None:
        return
    _set_each(instruments.LEAK_RMS, {age: values["leak_rms"] for age, values in leak["by_staleness"].items()})
    for name in WRONG:
        _set(instruments.WRONG_REASON.labels(name), leak[name])


def _set_each(gauge: Any, values: Mapping[str, float | None]) -> None:
    """Set a gauge for each staleness. A staleness of earlier batches without tokens in this one becomes NaN."""
    earlier = {sample.labels["staleness"] for metric in gauge.collect() for sample in metric.samples}
    for staleness in earlier | values.keys():
        _set(gauge.labels(staleness), values.get(staleness))


def _set(gauge: Any, value: float | None) -> None:
    """Set the gauge to the value, or to NaN if there is none, so that it does not keep the last value."""
    gauge.set(float("nan") if value is None else value)
