"""What a replica reports to Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

TOKENS = Counter("palimpsest_replica_scored_tokens", "Tokens scored", registry=REGISTRY)
PUBLISHED = Counter("palimpsest_replica_published_scores", "Records of old log-probs published", registry=REGISTRY)
SKIPPED = Counter(
    "palimpsest_replica_skipped", "Trajectories not scored, by reason and version's share of them", ["reason"],
    registry=REGISTRY,
)  # fmt: skip
WAITING = Gauge("palimpsest_replica_waiting_trajectories", "Read and not yet scored", registry=REGISTRY)
VERSION = Gauge("palimpsest_replica_version", "Version that the model holds", registry=REGISTRY)
LOADS = Counter("palimpsest_replica_loads", "Versions taken on", registry=REGISTRY)
LOAD_SECONDS = Histogram("palimpsest_replica_load_seconds", "Taking on a version", buckets=SECONDS, registry=REGISTRY)
PASS_SECONDS = Histogram("palimpsest_replica_pass_seconds", "One forward pass", buckets=SECONDS, registry=REGISTRY)
