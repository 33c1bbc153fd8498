"""Every Prometheus series of the learner."""

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

VERSION = Gauge("palimpsest_learner_version", "Newest version published", registry=REGISTRY)
LAST_VERSION = Gauge(
    "palimpsest_learner_last_version_seconds", "Seconds since the newest version was published", registry=REGISTRY
)
TRAINED = Counter("palimpsest_learner_trained_trajectories", "Trajectories trained on", registry=REGISTRY)
TOKENS = Counter("palimpsest_learner_trained_tokens", "Tokens trained on", registry=REGISTRY)
OFFERED = Counter("palimpsest_learner_offered_trajectories", "Trajectories offered to workers", registry=REGISTRY)
ADMITTED_GROUPS = Gauge(
    "palimpsest_learner_admitted_groups", "Groups that may be unresolved (learner.admission)", registry=REGISTRY
)
DROPPED = Counter(
    "palimpsest_learner_dropped_trajectories", "Trajectories dropped, by reason", ["reason"], registry=REGISTRY
)
TRAJECTORY_LENGTHS = Histogram(
    "palimpsest_learner_resolved_trajectory_tokens",
    "Sampled tokens of each trajectory that arrived; fate: trained, or the reason for which the learner dropped it",
    ["fate"],
    buckets=[2**power for power in range(4, 18)],
    registry=REGISTRY,
)
TOKEN_FATES = Counter(
    "palimpsest_learner_token_fates",
    "Tokens trained, and tokens lost because they exceed max_staleness, by length (tokens) and duration (seconds) of "
    "their trajectory; above: lower edge of the bin, a power of 2",
    ["by", "above", "fate"],
    registry=REGISTRY,
)
TOO_OLD_TOKENS = Counter(
    "palimpsest_learner_too_old_tokens",
    "Tokens of trained trajectories that are masked because they exceed max_staleness",
    registry=REGISTRY,
)
EVEN_GROUPS = Counter(
    "palimpsest_learner_even_groups",
    "Groups whose rewards are all equal, by environment; fate: kept in the batch, or skipped",
    ["environment", "fate"],
    registry=REGISTRY,
)
TRAINED_GROUPS = Counter(
    "palimpsest_learner_trained_groups", "Groups trained on, by environment", ["environment"], registry=REGISTRY
)
DEAD_LETTERS = Counter(
    "palimpsest_learner_dead_letters", "Records rejected as dead letters", ["cause", "topic"], registry=REGISTRY
)
FAILED_BRANCHES = Counter(
    "palimpsest_learner_failed_branches",
    "Branches of agents' sessions on which a pass fails: left out, while the rest of their session is trained on",
    registry=REGISTRY,
)
DUPLICATES = Counter("palimpsest_learner_duplicates", "Trajectories received again", registry=REGISTRY)
PENDING = Gauge("palimpsest_learner_pending_trajectories", "Trajectories offered and not resolved", registry=REGISTRY)
WAITING = Gauge(
    "palimpsest_learner_waiting_trajectories", "Trajectories received and not yet trained on", registry=REGISTRY
)
REWARD = Gauge("palimpsest_learner_reward", "Mean reward of the last batch", registry=REGISTRY)
SUCCESS = Gauge("palimpsest_learner_success", "Share of the last batch that solved its task", registry=REGISTRY)
ENVIRONMENT_REWARD = Gauge(
    "palimpsest_learner_environment_reward",
    "Mean reward of the environment's trajectories in the last batch",
    ["environment"],
    registry=REGISTRY,
)
TRUNCATED = Gauge(
    "palimpsest_learner_truncated_share",
    "Share of the last batch's trajectories that reached a limit on turns or tokens",
    registry=REGISTRY,
)
TRACKING_DROPPED = Counter(
    "palimpsest_learner_tracking_dropped",
    "Versions whose values the tracking system did not get: the queue was full, or it failed (`error`)",
    ["reason"],
    registry=REGISTRY,
)
CHANGES = Counter(
    "palimpsest_learner_changes", "Changes that people requested and the learner applied", ["kind"], registry=REGISTRY
)
SETTINGS_GENERATION = Gauge(
    "palimpsest_learner_settings_generation", "Number of changes of settings in the run", registry=REGISTRY
)
PAUSED = Gauge("palimpsest_learner_paused", "1 while a person paused this", ["what"], registry=REGISTRY)
PROXIMAL_EXACT = Gauge(
    "palimpsest_learner_proximal_exact", "1 while the proximal policy is the old policy", registry=REGISTRY
)
STALENESS = Histogram(
    "palimpsest_learner_staleness_versions",
    "Staleness of trained tokens",
    buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
    registry=REGISTRY,
)
LOG_DISCREPANCY = Gauge(
    "palimpsest_learner_log_discrepancy_abs",
    "Mean |log proximal / behavior| of the last batch, nats; while the proximal is exact, the discrepancy",
    ["staleness"],
    registry=REGISTRY,
)
LOG_STALENESS_RATIO = Gauge(
    "palimpsest_learner_log_staleness_ratio_abs",
    "Mean |log current / proximal| of the last batch, nats; while the proximal is exact, the staleness ratio",
    ["staleness"],
    registry=REGISTRY,
)
MASKED = Gauge(
    "palimpsest_learner_masked_share",
    "Share of tokens of the last batch that are masked",
    ["staleness"],
    registry=REGISTRY,
)
CLIPPED = Gauge(
    "palimpsest_learner_clipped_share",
    "Share of tokens of the last batch that are clipped",
    ["staleness"],
    registry=REGISTRY,
)
WORKER_LOG_DISCREPANCY = Gauge(
    "palimpsest_learner_worker_log_discrepancy_abs",
    "Mean |log proximal / behavior| of the last batch, by worker, nats",
    ["worker"],
    registry=REGISTRY,
)
BATCH = Gauge(
    "palimpsest_learner_batch",
    "Measures of the last batch: behavior_perplexity, proximal_perplexity, perplexity_difference, discrepancy_chi2, "
    "advantage_mean, advantage_deviation",
    ["what"],
    registry=REGISTRY,
)
LENGTH = Gauge(
    "palimpsest_learner_trajectory_tokens",
    "Mean length of the last batch's trajectories, tokens, by the staleness of the oldest token",
    ["staleness"],
    registry=REGISTRY,
)
OLDEST_LIVE = Gauge(
    "palimpsest_learner_oldest_live_seconds",
    "Seconds since the offer of the oldest live trajectory; NaN if no trajectory is live",
    registry=REGISTRY,
)
OLDEST_GROUP = Gauge(
    "palimpsest_learner_oldest_group_seconds",
    "Seconds since the offer of the oldest open group, also if all its trajectories arrived; NaN if no group is open",
    registry=REGISTRY,
)
GRAD_NORM = Gauge("palimpsest_learner_grad_norm", "Gradient norm before clipping", registry=REGISTRY)
ENTROPY = Gauge("palimpsest_learner_entropy", "Mean entropy of the last batch's tokens, nats", registry=REGISTRY)
LEARNING_RATE = Gauge(
    "palimpsest_learner_learning_rate", "Learning rate of the newest optimizer step", registry=REGISTRY
)
SKIPPED = Counter(
    "palimpsest_learner_skipped_steps", "Optimizer steps skipped because a gradient was not finite", registry=REGISTRY
)
EMPTY = Counter(
    "palimpsest_learner_empty_minibatches",
    "Minibatches without a usable token; they take no optimizer step",
    registry=REGISTRY,
)
NONFINITE = Counter(
    "palimpsest_learner_nonfinite_tokens", "Tokens masked because a log-prob was not finite", registry=REGISTRY
)
SNAPSHOT_LOADS = Counter(
    "palimpsest_learner_snapshot_loads", "Versions loaded by the shadow copy of the model", registry=REGISTRY
)
PHASE_SECONDS = Histogram(
    "palimpsest_learner_phase_seconds", "Time for one version, by phase", ["phase"], buckets=SECONDS, registry=REGISTRY
)  # phase: wait, train (old log-probs included), report (records and everything else), publish,
# publish_wait (before the first step, for a version that a thread publishes), checkpoint
ALERT = Gauge(
    "palimpsest_learner_alert",
    "1 while the rule's alert is on; NaN while the newest version has no value for it",
    ["rule"],
    registry=REGISTRY,
)
LOG_RATIO_TOKENS = Counter(
    "palimpsest_learner_log_ratio_tokens",
    "Tokens in each bin of a log-ratio; above: lower edge of the bin, nats",
    ["ratio", "staleness", "above"],
    registry=REGISTRY,
)  # ratio: discrepancy, staleness_first, staleness_later, total; staleness: 0, 1, 2, 3-4, 5-8, >8
REMOVED = Counter(
    "palimpsest_learner_removed_tokens",
    "Tokens masked or clipped, by cause; exclusive: whether the count excludes tokens that another cause removes too",
    ["cause", "exclusive"],
    registry=REGISTRY,
)
ACTIVE = Gauge(
    "palimpsest_learner_active_share", "Share of tokens of the last batch neither masked nor clipped", registry=REGISTRY
)
REMOVED_ADVANTAGE = Gauge(
    "palimpsest_learner_removed_advantage_share",
    "Share of the sum of |A| that masks and clips removed, last batch",
    registry=REGISTRY,
)
SLOPE = Gauge(
    "palimpsest_learner_removal_slope",
    "Change of the masked and of the clipped share with each version of staleness, last batch",
    ["removal"],
    registry=REGISTRY,
)
EFFECTIVE = Gauge(
    "palimpsest_learner_effective_share",
    "ESS / N of the last batch; of: tokens, sequences; weights: raw, used",
    ["of", "weights"],
    registry=REGISTRY,
)
CAPPED = Counter(
    "palimpsest_learner_capped_tokens", "Tokens whose weight was clamped to its bound", ["bound"], registry=REGISTRY
)
LR_FACTOR = Gauge(
    "palimpsest_learner_lr_factor", "Factor on the learning rate from the effective samples", registry=REGISTRY
)
NORMALIZER = Gauge("palimpsest_learner_weight_normalizer", "Mean weight; weights are divided by it", registry=REGISTRY)
OLD_COVERAGE = Gauge(
    "palimpsest_learner_old_coverage",
    "Share of tokens of the last batch whose proximal is the old log-prob",
    registry=REGISTRY,
)
FALLBACKS = Counter(
    "palimpsest_learner_fallbacks",
    "Tokens whose old log-prob was replaced, or that were excluded because a value is missing; 0 in normal operation",
    ["cause"],
    registry=REGISTRY,
)
LEAK_RMS = Gauge(
    "palimpsest_learner_leak_rms",
    "Root mean square of log surrogate / old over the newest audited batch, nats",
    ["staleness"],
    registry=REGISTRY,
)
WRONG_REASON = Gauge(
    "palimpsest_learner_wrong_reason_share",
    "Share of tokens of the newest audited batch that the surrogate masks or clips differently from old log-probs",
    ["judged"],
    registry=REGISTRY,
)
GROUP_SPAN = Gauge(
    "palimpsest_learner_group_span_versions",
    "Newest minus oldest version in a group, mean of the last batch",
    registry=REGISTRY,
)
COMPANION = Gauge(
    "palimpsest_learner_companion",
    "State of the proximal source and the loss: ewma_decay, ewma_age, ewma_distance, ewma_resets, multiplier, ...",
    ["what"],
    registry=REGISTRY,
)
TRAIN_SECONDS = Counter(
    "palimpsest_learner_train_seconds",
    "Seconds of training, by part: proximal, audit, prepare, passes, cut, step",
    ["part"],
    registry=REGISTRY,
)
CUTS = Counter("palimpsest_learner_cuts", "Cuts requested", registry=REGISTRY)
CUT_SECONDS = Histogram(
    "palimpsest_learner_cut_seconds", "Time for one cut, by phase", ["phase"], buckets=SECONDS, registry=REGISTRY
)  # phase: before, request, wait, read, score, stall (total time that the workers are paused)
LATE_WORKERS = Counter("palimpsest_learner_cut_late_workers", "Workers excluded from a cut", registry=REGISTRY)
LATE_ANSWERS = Counter(
    "palimpsest_learner_cut_late_answers", "Answers of workers after the cut ended", registry=REGISTRY
)
FLUSHES = Counter(
    "palimpsest_learner_flushes",
    "Flushes of live trajectories, by outcome",
    ["outcome"],
    registry=REGISTRY,
)  # outcome: scored, late (the version is gone), needless (the trajectory ended, or a longer flush arrived)
LATE_TOKENS = Counter(
    "palimpsest_learner_late_tokens",
    "Flushed tokens that were not scored because their version was released",
    registry=REGISTRY,
)
OLD_SCORED = Counter(
    "palimpsest_learner_old_scored_tokens",
    "Tokens scored while their version was resident",
    ["when"],
    registry=REGISTRY,
)  # when: early (while waiting for a batch), cut
OLD_UNSCORABLE = Counter("palimpsest_learner_old_unscorable_tokens", "Tokens whose score is NaN", registry=REGISTRY)
OLD_FOUND = Counter(
    "palimpsest_learner_old_found_tokens", "Tokens whose score was found on the log after a restart", registry=REGISTRY
)
