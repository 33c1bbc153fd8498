"""Prometheus metrics of a rollout worker."""

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

TOKENS = Counter("palimpsest_rollout_sampled_tokens", "Tokens sampled", registry=REGISTRY)
TRAJECTORIES = Counter(
    "palimpsest_rollout_trajectories", "Trajectories that ended, by outcome", ["end"], registry=REGISTRY
)  # end: terminated, truncated, or a drop reason
AGENT_MESSAGES = Counter(
    "palimpsest_rollout_agent_messages",
    "Model messages that agent programs asked for, by what the request did",
    ["place"],
    registry=REGISTRY,
)  # place: first, continued, branched, refused
LIVE = Gauge("palimpsest_rollout_live_trajectories", "Trajectories in flight", registry=REGISTRY)
VERSION = Gauge("palimpsest_rollout_version", "Version on the engine", registry=REGISTRY)
UPDATES = Counter(
    "palimpsest_rollout_updates", "Versions applied to the engine, by outcome", ["outcome"], registry=REGISTRY
)  # outcome: accepted, refused
PAUSE_SECONDS = Histogram(
    "palimpsest_rollout_update_pause_seconds",
    "Pause of generation for an update",
    buckets=SECONDS,
    registry=REGISTRY,
)
CUT_PAUSE_SECONDS = Histogram(
    "palimpsest_rollout_cut_pause_seconds",
    "Time from the request of a cut to the pause of the engine",
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
    "palimpsest_rollout_holds_given_up", "Cuts whose hold ended before the learner sent a record", registry=REGISTRY
)
FLUSHED = Counter("palimpsest_rollout_flushed", "Trajectories in flight that were flushed at cuts", registry=REGISTRY)
FETCH_SECONDS = Histogram(
    "palimpsest_rollout_fetch_seconds",
    "Download of what a version changes, and its application to the weights in a file",
    buckets=SECONDS,
    registry=REGISTRY,
)
FETCHED_BYTES = Counter(
    "palimpsest_rollout_fetched_bytes", "Bytes of bases and deltas applied for new versions", registry=REGISTRY
)
CANARY_ERROR = Gauge(
    "palimpsest_rollout_canary_error_nats", "Mean |engine - learner| over the last canary", registry=REGISTRY
)
ENVIRONMENT_SECONDS = Histogram(
    "palimpsest_rollout_environment_seconds", "Time of a call to the gateway", buckets=SECONDS, registry=REGISTRY
)
ATTEMPTS_FAILED = Counter(
    "palimpsest_rollout_failed_attempts",
    "Failed attempts at a trajectory, by error code",
    ["code"],
    registry=REGISTRY,
)
IDLE_SECONDS = Counter("palimpsest_rollout_idle_seconds", "Seconds without a trajectory in flight", registry=REGISTRY)
DEAD_LETTERS = Counter(
    "palimpsest_rollout_dead_letters", "Records rejected as dead letters", ["cause", "topic"], registry=REGISTRY
)
