"""Small history lines and statuses, with values that are easy to sum by hand."""

from typing import Any

from palimpsest.services.live.poller import ServiceObservation, StatusReply
from palimpsest.services.report.folder import Line


def a_line(
    version: int,
    *,
    successes: str = "01",
    reward: float = 0.5,
    seconds: float | None = None,
    phases: dict[str, float] | None = None,
    tokens: dict[int, dict[str, float]] | None = None,
    **more: Any,
) -> Line:
    """The history line of `version`. `tokens`: staleness -> values that differ from `some`."""
    by_staleness = {str(s): some(**values) for s, values in (tokens or {0: {}}).items()}
    count = sum(values["tokens"] for values in by_staleness.values())
    return {
        "version": version,
        "published": version + 1,
        "seconds": 10.0 + version if seconds is None else seconds,
        "phases": phases or {"checkpoint": 0.1, "publish": 0.2, "wait": 0.3, "train": 0.4},
        "trajectories": {"offered": 40, "trained": 2, "dropped": {}, "dead_lettered": 0, "pending": 38},
        "batch": len(successes),
        "tokens": int(count),
        "reward": reward,
        "successes": successes,
        "multi_version": 1,
        "cuts": 1,
        "exact": True,
        "skipped": 0,
        "by_staleness": by_staleness,
        "first_minibatch": by_staleness,
        "staleness_max": max(map(int, by_staleness)),
        "staleness_mean": 0.5,
        **more,
    }


def some(tokens: float = 10.0, **more: float) -> dict[str, float]:
    """Statistics of the tokens of one staleness."""
    return {
        "tokens": tokens,
        "log_discrepancy_abs": 0.001,
        "log_staleness_ratio_abs": 0.02,
        "log_total_ratio_abs": 0.02,
        "masked": 0.0,
        "clipped": 0.0,
        "entropy": 0.5,
        "nonfinite": 0.0,
    } | more


def worker(
    at: float = 100.0, *, earlier: ServiceObservation | None = None, trouble: str | None = None, **more: Any
) -> ServiceObservation:
    """Observation of a sampling worker."""
    status = {"version": 4, "live": 12, "sampled_tokens": 1000, "seconds": 60.0, "idle_s": 0.0, "waiting_for": None}
    return ServiceObservation(StatusReply(at, status | more), earlier.last if earlier else None, trouble)


def learner(at: float = 100.0, *, trouble: str | None = None, **more: Any) -> ServiceObservation:
    """Observation of a training learner."""
    status = {
        "version": 5,
        "versions": 10,
        "trained_versions": 5,
        "waiting_trajectories": 7,
        "waiting_for": None,
        "trajectories": {"offered": 40, "trained": 10, "dropped": {}, "dead_lettered": 0, "pending": 30},
    }
    return ServiceObservation(StatusReply(at, status | more), None, trouble)


def servers(at: float = 100.0) -> dict[str, ServiceObservation]:
    """Observations of a healthy store and gateway."""
    return {
        "snapshot_store": ServiceObservation(StatusReply(at, {"versions": 6, "bytes": 2**20, "waiting_for": None})),
        "env_gateway": ServiceObservation(StatusReply(at, {"waiting_for": None})),
    }
