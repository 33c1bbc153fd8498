"""Prometheus metrics of a rollout worker."""

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

TOKENS = Counter("palimpsest_rollout_sampled_tokens", "Tokens sampled", registry=REGISTRY)
TRAJECTORIES = Counter(
    "palimpsest_rollout_trajectories", "Trajectories that ended, by how", ["end"], registry=REGISTRY
)  # end: terminated, truncated, or a drop reason
LIVE = Gauge("palimpsest_rollout_live_trajectories", "Trajectories in flight", registry=REGISTRY)
VERSION = Gauge("palimpsest_rollout_version", "Version of the engine", registry=REGISTRY)
UPDATES = Counter(
    "palimpsest_rollout_updates", "Versions accepted or refused", ["outcome"], registry=REGISTRY
)  # outcome: accepted, refused
PAUSE_SECONDS = Histogram(
    "palimpsest_rollout_update_pause_seconds",
    "Pause of generation for an update",
    buckets=SECONDS,
    registry=REGISTRY,
)
CUT_PAUSE_SECONDS = Histogram(
    "palimpsest_rollout_cut_pause_seconds",
    "From the request of a cut until the engine is paused",
    buckets=SECONDS,
    registry=REGISTRY,
)
HOLD_SECONDS = Histogram(
    "palimpsest_rollout_hold_seconds",
    "Pause of generation for a cut, until a newer version is loaded or the cut is released",
    buckets=SECONDS,
    registry=REGISTRY,
)
HOLDS_GIVEN_UP = Counter(
    "palimpsest_rollout_holds_given_up", "Cuts whose hold ended without a record of the learner", registry=REGISTRY
)
FLUSHED = Counter("palimpsest_rollout_flushed", "Trajectories in flight that were flushed at cuts", registry=REGISTRY)
FETCH_SECONDS = Histogram(
    "palimpsest_rollout_fetch_seconds", "Download of a version from the store", buckets=SECONDS, registry=REGISTRY
)
CANARY_ERROR = Gauge(
    "palimpsest_rollout_canary_error_nats", "Mean |engine - learner| over the last canary", registry=REGISTRY
)
ENVIRONMENT_SECONDS = Histogram(
    "palimpsest_rollout_environment_seconds", "Waiting for the gateway, per call", buckets=SECONDS, registry=REGISTRY
)
ATTEMPTS_FAILED = Counter(
    "palimpsest_rollout_failed_attempts",
    "Attempts at a trajectory that failed, by code",
    ["code"],
    registry=REGISTRY,
)
IDLE_SECONDS = Counter("palimpsest_rollout_idle_seconds", "Seconds without any trajectory in flight", registry=REGISTRY)
DEAD_LETTERS = Counter(
    "palimpsest_rollout_dead_letters", "Records that could not be used", ["cause", "topic"], registry=REGISTRY
)
