"""What the learner reports to Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

from common.metrics import REGISTRY, SECONDS

VERSION = Gauge("palimpsest_learner_version", "Newest version published", registry=REGISTRY)
TRAINED = Counter("palimpsest_learner_trained_trajectories", "Trajectories trained on", registry=REGISTRY)
TOKENS = Counter("palimpsest_learner_trained_tokens", "Tokens trained on", registry=REGISTRY)
OFFERED = Counter("palimpsest_learner_offered_trajectories", "Trajectories offered to workers", registry=REGISTRY)
DROPPED = Counter(
    "palimpsest_learner_dropped_trajectories", "Trajectories dropped, by reason", ["reason"], registry=REGISTRY
)
DEAD_LETTERS = Counter(
    "palimpsest_learner_dead_letters", "Records that could not be used", ["cause", "topic"], registry=REGISTRY
)
DUPLICATES = Counter("palimpsest_learner_duplicates", "Trajectories that came again", registry=REGISTRY)
PENDING = Gauge("palimpsest_learner_pending_trajectories", "Offered and not resolved", registry=REGISTRY)
WAITING = Gauge("palimpsest_learner_waiting_trajectories", "Arrived and not yet trained on", registry=REGISTRY)
REWARD = Gauge("palimpsest_learner_reward", "Mean reward of the last batch", registry=REGISTRY)
SUCCESS = Gauge("palimpsest_learner_success", "Share of the last batch that solved its task", registry=REGISTRY)
PROXIMAL_EXACT = Gauge(
    "palimpsest_learner_proximal_exact", "1 while the clip anchor is the old policy", registry=REGISTRY
)
STALENESS = Histogram(
    "palimpsest_learner_staleness_versions",
    "Staleness of trained tokens",
    buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
    registry=REGISTRY,
)
LOG_DISCREPANCY = Gauge(
    "palimpsest_learner_log_discrepancy_abs", "Mean |log pi_v / mu_v| of the last batch, nats", ["staleness"],
    registry=REGISTRY,
)  # fmt: skip
LOG_STALENESS_RATIO = Gauge(
    "palimpsest_learner_log_staleness_ratio_abs", "Mean |log pi_theta / pi_v| of the last batch, nats", ["staleness"],
    registry=REGISTRY,
)  # fmt: skip
MASKED = Gauge(
    "palimpsest_learner_masked_share", "Tokens of the last batch outside the band", ["staleness"], registry=REGISTRY
)
CLIPPED = Gauge(
    "palimpsest_learner_clipped_share", "Tokens of the last batch that were clipped", ["staleness"], registry=REGISTRY
)
GRAD_NORM = Gauge("palimpsest_learner_grad_norm", "Gradient norm before clipping", registry=REGISTRY)
SKIPPED = Counter(
    "palimpsest_learner_skipped_steps", "Optimizer steps left out: gradient not finite", registry=REGISTRY
)
NONFINITE = Counter("palimpsest_learner_nonfinite_tokens", "Tokens masked: a log-prob not finite", registry=REGISTRY)
SNAPSHOT_LOADS = Counter("palimpsest_learner_snapshot_loads", "Versions taken on by the shadow", registry=REGISTRY)
PHASE_SECONDS = Histogram(
    "palimpsest_learner_phase_seconds", "Time for one version, by phase", ["phase"], buckets=SECONDS, registry=REGISTRY
)  # phase: wait, train (old log-probs included), publish, checkpoint
