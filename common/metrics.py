"""Prometheus metrics: one registry per process. Each service defines its metrics in its own metrics.py."""

from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry()
"""Registry of all metrics of this process."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Histogram bounds for durations, in seconds."""
