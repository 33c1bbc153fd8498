"""Prometheus metrics of the gateway beside those of its sessions (common/sessions/instruments.py)."""

from prometheus_client import Counter

from palimpsest.common.metrics import REGISTRY

HOSTS_REFUSED = Counter(
    "palimpsest_gateway_hosts_refused",
    "Connections of sessions to hosts that env_gateway.child_hosts does not name",
    ["environment"],
    registry=REGISTRY,
)
