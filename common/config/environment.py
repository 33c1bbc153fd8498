"""Configuration keys in environment variables: PALIMPSEST_LEARNER__VERSIONS is learner.versions. Pure."""

import re
from collections.abc import Mapping

ENV_PREFIX = "PALIMPSEST_"
NOT_KEYS = (
    "PALIMPSEST_CACHE",
    "PALIMPSEST_ENGINE_",
    "PALIMPSEST_FAULT",
    "PALIMPSEST_GATEWAY_TOKEN",
    "PALIMPSEST_KAFKA_",
    "PALIMPSEST_METRICS_TOKEN",
    "PALIMPSEST_SERVICE_TOKEN",
    "PALIMPSEST_TOKEN",
)
"""Prefixes of environment variables that are not configuration keys: tools/backends, variables that a worker sets for
its engine processes, common/failpoints.py, common/control/credentials.py, common/bus/kafka."""
SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?$")
"""The end of a variable that Kubernetes sets for each service of the namespace: PALIMPSEST_STORE_SERVICE_HOST and
PALIMPSEST_STORE_PORT=tcp://10.0.0.7:8200 for a service palimpsest-store. Source: Kubernetes, "Service", environment
variables. A configuration key has a double underscore, which a service link does not have."""


def variables(environment: Mapping[str, str]) -> list[tuple[tuple[str, ...], str, str]]:
    """Return key, value and name of each variable that sets a key. A section precedes its keys."""
    return [
        (tuple(part.lower() for part in name.removeprefix(ENV_PREFIX).split("__")), environment[name], name)
        for name in sorted(environment)
        if name.startswith(ENV_PREFIX) and not name.startswith(NOT_KEYS) and not _is_service_link(name)
    ]


def _is_service_link(name: str) -> bool:
    return "__" not in name and SERVICE_LINK.search(name) is not None
