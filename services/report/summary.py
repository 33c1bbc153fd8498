"""Computes summary.json (docs/report.md describes its keys). Pure except for `write_summary`."""

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.files import write
from palimpsest.common.messages import WorkerAlive
from palimpsest.services.report.aggregates import alert_spans, leak, removal, stored, token_fates
from palimpsest.services.report.changes import change_list, planned_versions
from palimpsest.services.report.folder import Contents
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import coverage, methods

MEASURES = (
    "behavior_perplexity", "proximal_perplexity", "perplexity_difference", "discrepancy_chi2", "advantage_deviation",
)  # fmt: skip
"""Measures of a batch whose mean over the versions the summary holds."""
PHASES = ("wait", "train", "report", "publish", "publish_wait", "checkpoint")


def write_summary(contents: Contents) -> dict[str, Any]:
    """Write the folder's summary.json and return its values."""
    summary = summarize(contents)
    write(contents.folder / run_folder.SUMMARY, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    return summary


def summarize(contents: Contents) -> dict[str, Any]:
    """Return the summary. An unknown number is None, never 0."""
    lines, config = contents.lines, contents.config
    seconds = run_seconds(contents)
    tokens_trained = sum(line["tokens"] for line in lines)
    return (
        _identity(config)
        | {
            "versions": len(lines),
            "finished": len(lines) >= planned_versions(config, contents.log.changes),
            "tokens_trained": tokens_trained,
            "trajectories": ledger(contents),
            "dropped_share": _dropped_share(ledger(contents)),
            "duplicates": contents.log.duplicates if contents.log.records else None,
            "dead_letters": contents.log.dead_letters,
            "changes": change_list(contents.log.changes),
            "evaluations": list(contents.evaluations),
            "best_version": contents.evaluations[-1]["best"] if contents.evaluations else None,
        }
        | _learning(lines)
        | _policies(lines)
        | {
            "seconds": seconds,
            "phases": phases(lines),
            "learner_wait_share": learner_wait_share(lines),
            "stored": stored(lines),
            "tokens_per_second": {
                "rollout": _rollout_rate(contents.log.alive),
                "learner": _share(tokens_trained, seconds["run"]) if tokens_trained else None,
            },
        }
        | _workers(contents)
    )


def ledger(contents: Contents) -> dict[str, Any]:
    """Return the counts of trajectories: offered = trained + dropped + dead_lettered + pending."""
    known: dict[str, Any]
    if contents.checkpoint is not None:
        state = contents.checkpoint.ledger
        known = {
            "offered": state.offered,
            "trained": state.trained,
            "dropped": dict(state.dropped),
            "dead_lettered": state.dead_lettered,
        }
    elif contents.lines:
        known = dict(contents.lines[-1]["trajectories"])
    else:
        known = {"offered": contents.log.offered, "trained": 0, "dropped": {}, "dead_lettered": 0}
    resolved = known["trained"] + sum(known["dropped"].values()) + known["dead_lettered"]
    return known | {"pending": known["offered"] - resolved}


def tenth(successes: str) -> tuple[str, str]:
    """Return the first and the last tenth, at least one character each.

    >>> tenth("00000000000000000111")
    ('00', '11')
    """
    n = max(1, len(successes) // 10)
    return successes[:n], successes[-n:]


def mean_by_staleness(lines: Sequence[Line], key: str, *, of: str = "by_staleness") -> dict[str, float]:
    """Return staleness -> mean of `key` over its tokens in the run; log-ratios without values that are not finite."""
    sums: dict[int, tuple[float, float]] = {}
    for line in lines:
        for staleness, values in line[of].items():
            if values[key] is None:
                continue  # no token of this staleness has the value
            tokens = values["tokens"]
            if "log_" in key:
                tokens -= values["nonfinite"] + values.get("missing", 0.0)
            total, count = sums.get(int(staleness), (0.0, 0.0))
            sums[int(staleness)] = (total + tokens * values[key], count + tokens)
    return {str(staleness): sums[staleness][0] / sums[staleness][1] for staleness in sorted(sums) if sums[staleness][1]}


def tokens_by_staleness(lines: Sequence[Line]) -> dict[str, int]:
    """Return staleness -> trained tokens."""
    counts: dict[int, int] = {}
    for line in lines:
        for staleness, values in line["by_staleness"].items():
            counts[int(staleness)] = counts.get(int(staleness), 0) + int(values["tokens"])
    return {str(staleness): counts[staleness] for staleness in sorted(counts)}


def phases(lines: Sequence[Line]) -> dict[str, float]:
    """Return the learner's seconds by phase; `wait` includes the wait for the engines at each start."""
    return {phase: sum(line["phases"].get(phase, 0.0) for line in lines) for phase in PHASES}


def is_first_after_start(line: Line) -> bool:
    """Whether the line is the first after a start: only then no publication precedes it."""
    return "publish" not in line["phases"]


def learner_wait_share(lines: Sequence[Line]) -> float | None:
    """Return the share of time in which the learner waited for trajectories, without the first batch of each start."""
    steady = phases([line for line in lines if not is_first_after_start(line)])
    return _share(steady["wait"], sum(steady.values()))


def last_heartbeats(alive: Sequence[WorkerAlive]) -> list[WorkerAlive]:
    """Return the last heartbeat of each worker process; a restarted worker counts from 0."""
    last = []
    for worker in dict.fromkeys(message.worker for message in alive):
        own = [message for message in alive if message.worker == worker]
        last += [a for a, b in pairwise(own) if b.seconds < a.seconds or b.sampled_tokens < a.sampled_tokens]
        last.append(own[-1])
    return last


def run_seconds(contents: Contents) -> dict[str, float | None]:
    """Return the seconds of setup and run. Without seconds.json, `run` is the learner's time."""
    if contents.seconds is not None:
        return {"setup": contents.seconds.setup, "run": contents.seconds.run}
    if contents.checkpoint is not None:
        return {"setup": None, "run": contents.checkpoint.seconds}
    return {"setup": None, "run": contents.lines[-1]["seconds"] if contents.lines else None}


def _identity(config: RunConfig) -> dict[str, Any]:
    return {
        "run": config.run.id,
        "model": config.model.path,
        "engine": config.rollout.engine.kind,
        "environments": dict(config.tasks.environments),
    }


def _learning(lines: Sequence[Line]) -> dict[str, float | None]:
    successes = "".join(line["successes"] for line in lines)
    if not successes:
        return dict.fromkeys(("success_first", "success_last", "reward_first", "reward_last"))
    first, last = tenth(successes)
    return {
        "success_first": first.count("1") / len(first),
        "success_last": last.count("1") / len(last),
        "reward_first": _mean_reward(lines, len(first)),
        "reward_last": _mean_reward(lines[::-1], len(last)),
    }


def _mean_reward(lines: Sequence[Line], trajectories: int) -> float:
    """Return the mean over the first `trajectories`; a partly included batch counts with its mean."""
    total, left = 0.0, trajectories
    for line in lines:
        taken = min(left, line["batch"])
        total, left = total + taken * line["reward"], left - taken
    return total / trajectories


def _policies(lines: Sequence[Line]) -> dict[str, Any]:
    discrepancy = mean_by_staleness(lines, "log_discrepancy_abs")
    entropy = mean_by_staleness(lines, "entropy")
    per_entropy = {s: discrepancy[s] / entropy[s] for s in discrepancy if entropy.get(s)}
    return {
        "exact": all(line["exact"] for line in lines) if lines else None,
        "proximal": methods(lines),
        "old_coverage": _old_coverage(lines),
        "log_discrepancy": {"mean_abs": discrepancy, "mean_abs_per_nat_of_entropy": per_entropy},
        "log_staleness_ratio": {"mean_abs": mean_by_staleness(lines, "log_staleness_ratio_abs")},
        "masked_share": mean_by_staleness(lines, "masked"),
        "clipped_share": mean_by_staleness(lines, "clipped"),
        "tokens_by_staleness": tokens_by_staleness(lines),
        "max_staleness_seen": max(
            (line["staleness_max"] for line in lines if line["staleness_max"] is not None), default=None
        ),
        "multi_version_trajectories": sum(line["multi_version"] for line in lines),
        "cuts": sum(line["cuts"] for line in lines),
        "removal": removal(lines),
        "token_fates": token_fates(lines),
        "leak": leak(lines),
        "measures": {name: _mean_of_known([line.get("all", {}).get(name) for line in lines]) for name in MEASURES},
        "alerts": alert_spans(lines),
        "unknown_alerts": dict(Counter(rule for line in lines for rule in line.get("unknown_alerts", ()))),
    }


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean over the versions with a value; None without any, for example in lines of an older release."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _old_coverage(lines: Sequence[Line]) -> float | None:
    """Return the share of the run's tokens whose proximal log-prob is the old one."""
    counted = [(coverage(line), line["tokens"]) for line in lines]
    known = [(share, tokens) for share, tokens in counted if share is not None]
    return _share(sum(share * tokens for share, tokens in known), sum(tokens for _, tokens in known))


def _workers(contents: Contents) -> dict[str, Any]:
    log = contents.log
    lives = last_heartbeats(log.alive)
    pauses = [1e3 * applied.pause_s for applied in log.applied]
    return {
        "rollout_wait_share": _share(sum(a.idle_s for a in lives), sum(a.seconds for a in lives)),
        "update_pause_ms_p50": statistics.median(pauses) if pauses else None,
        "canary_error_max": max((applied.canary_error for applied in log.applied), default=None),
        "refused_versions": sum(not applied.accepted for applied in log.applied),
        "log_bytes_per_token": _share(log.bytes, log.tokens),
    }


def _rollout_rate(alive: Sequence[WorkerAlive]) -> float | None:
    """Return the tokens sampled per second in which a worker could sample, summed over workers."""
    rates = []
    for worker in {message.worker for message in alive}:
        lives = last_heartbeats([message for message in alive if message.worker == worker])
        rates.append(_share(sum(a.sampled_tokens for a in lives), sum(a.seconds for a in lives)))
    return sum(rate for rate in rates if rate is not None) if any(rates) else None


def _dropped_share(trajectories: dict[str, Any]) -> float | None:
    """Return the dropped share of the trajectories that have an end."""
    return _share(sum(trajectories["dropped"].values()), trajectories["offered"] - trajectories["pending"])


def _share(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
