"""Every Prometheus series of a replica."""

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

TOKENS = Counter("palimpsest_replica_scored_tokens", "Tokens scored", registry=REGISTRY)
PUBLISHED = Counter("palimpsest_replica_published_scores", "Records of old log-probs published", registry=REGISTRY)
SKIPPED = Counter(
    "palimpsest_replica_skipped",
    "Trajectories not scored, by reason; counted once for each of their versions",
    ["reason"],
    registry=REGISTRY,
)
WAITING = Gauge(
    "palimpsest_replica_waiting_trajectories",
    "Trajectories read and not yet scored; counted once for each of their versions",
    registry=REGISTRY,
)
VERSION = Gauge("palimpsest_replica_version", "Version that the model holds", registry=REGISTRY)
LOADS = Counter("palimpsest_replica_loads", "Versions loaded into the model", registry=REGISTRY)
LOAD_SECONDS = Histogram(
    "palimpsest_replica_load_seconds", "Time to load a version", buckets=SECONDS, registry=REGISTRY
)
PASS_SECONDS = Histogram(
    "palimpsest_replica_pass_seconds", "Time of a forward pass", buckets=SECONDS, registry=REGISTRY
)
