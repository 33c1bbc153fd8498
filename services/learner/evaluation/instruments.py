"""Metrics of evaluations."""

from prometheus_client import Counter, Gauge

from palimpsest.common.metrics import REGISTRY

SUCCESS = Gauge(
    "palimpsest_evaluation_success",
    "Share of successful trajectories on held-out tasks (avg@k), of the version evaluated last, by environment",
    ["environment"],
    registry=REGISTRY,
)
PASSED = Gauge(
    "palimpsest_evaluation_passed",
    "Share of held-out tasks of which one of k trajectories succeeds (pass@k), of the version evaluated last, by "
    "environment",
    ["environment"],
    registry=REGISTRY,
)
VERSION = Gauge("palimpsest_evaluation_version", "Version evaluated last", registry=REGISTRY)
BEST = Gauge("palimpsest_evaluation_best_version", "Version with the best evaluation", registry=REGISTRY)
SECONDS = Gauge(
    "palimpsest_evaluation_seconds",
    "Duration of the last evaluation, in seconds. Workers load no later version in this time",
    registry=REGISTRY,
)
SAMPLES = Counter(
    "palimpsest_evaluation_samples",
    "Trajectories of evaluations, by end: scored, dead_lettered, or why they were dropped",
    ["end"],
    registry=REGISTRY,
)
