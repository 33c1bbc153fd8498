"""Prometheus metrics: one registry a process. Each service names its own in its metrics.py."""

from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry()
"""All of this process's metrics."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Histogram bounds for durations."""
