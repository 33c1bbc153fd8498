"""Small history lines and statuses, with values that are easy to sum by hand."""

from typing import Any

from palimpsest.services.live.poller import ServiceObservation, StatusReply
from palimpsest.services.report.history_line import Line


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


def a_full_line(version: int, **more: Any) -> Line:
    """The history line of `version` with the values of every figure of whole batches."""
    spread = {"bins": [1] * 17}
    measures = ("discrepancy_k1", "discrepancy_k2", "discrepancy_k3", "discrepancy_chi2")
    values = dict.fromkeys(measures, 0.001 * (1 + version % 3))
    ratios = ("discrepancy", "staleness_first")
    return a_line(
        version,
        tokens={0: {}, 1: {"tokens": 30.0}, 2: {"tokens": 5.0}},
        all=values | {"behavior_perplexity": 1.6, "proximal_perplexity": 1.7, "entropy": 0.8 - 0.01 * version},
        ess_shares=dict.fromkeys(("tokens_raw", "tokens_used", "sequences_raw", "sequences_used"), 0.9),
        by_worker={"worker-0": some(), "worker-1": some()},
        versions={"length": {"0": 50.0, "1": 60.0}, "oldest": {"0": 1, "1": 1}},
        ratios={name: {"all": spread, "0": spread, "1": spread} for name in ratios},
        grad_norm=1.0 + version % 4,
        learning_rate=1e-4 * (1 + version // 10),
        length=50.0 + version,
        settings=version // 10,
        **more,
    )


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
