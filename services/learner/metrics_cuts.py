"""What the learner reports to Prometheus about cuts and about scores made before they are needed."""

from prometheus_client import Counter, Histogram

from common.metrics import REGISTRY, SECONDS

CUTS = Counter("palimpsest_learner_cuts", "Interruptions asked for", registry=REGISTRY)
CUT_SECONDS = Histogram(
    "palimpsest_learner_cut_seconds", "Time for one cut, by phase", ["phase"], buckets=SECONDS, registry=REGISTRY
)  # phase: wait, read, score, stall (all of it, while the workers stand still)
LATE_WORKERS = Counter("palimpsest_learner_cut_late_workers", "Workers left out of a cut", registry=REGISTRY)
LATE_ANSWERS = Counter(
    "palimpsest_learner_cut_late_answers", "Answers of workers to a cut that was over", registry=REGISTRY
)
FLUSHES = Counter(
    "palimpsest_learner_flushes",
    "Flushes of live trajectories, by what became of them",
    ["outcome"],
    registry=REGISTRY,
)  # outcome: scored (or known already), late (the version is gone), needless (its end, or a longer flush, is here)
LATE_TOKENS = Counter(
    "palimpsest_learner_late_tokens", "Flushed tokens of a version that was gone, so never scored", registry=REGISTRY
)
OLD_SCORED = Counter(
    "palimpsest_learner_old_scored_tokens",
    "Tokens scored while their version was resident",
    ["when"],
    registry=REGISTRY,
)  # when: early (while waiting for a batch), cut
OLD_UNSCORABLE = Counter(
    "palimpsest_learner_old_unscorable_tokens", "Tokens whose score is no number", registry=REGISTRY
)
OLD_FOUND = Counter(
    "palimpsest_learner_old_found_tokens", "Tokens whose score stood on the log after a restart", registry=REGISTRY
)
