"""Names of the Prometheus series: those that the services have, and those that an expression uses."""

import importlib
import re

from palimpsest.common.metrics import REGISTRY
from tools.references import SERVICES

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}
NAME = re.compile(r"\b(?:palimpsest|process)[a-z0-9_:]*")
ONE_OF = re.compile(r'\{__name__=~"([a-z_]*)\(([a-z_|]+)\)([a-z_]*)"')


def code_series() -> set[str]:
    """Names of all series of all services, as a scrape has them."""
    for module in ("outages", "instruments"):
        importlib.import_module(f"palimpsest.common.{module}")
    for service in SERVICES:
        importlib.import_module(f"palimpsest.services.{service}.instruments")
    return {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES[family.type]}


def series_in(expression: str) -> set[str]:
    """Names of the series in an expression.

    >>> sorted(series_in('{__name__=~"palimpsest_(a|b)_total"} > rate(palimpsest_c_total{of="palimpsest_d"}[5m])'))
    ['palimpsest_a_total', 'palimpsest_b_total', 'palimpsest_c_total']
    """
    spelled = ONE_OF.sub(
        lambda found: " ".join(f"{found[1]}{word}{found[3]}" for word in found[2].split("|")) + " {", expression
    )
    return set(NAME.findall(re.sub(r'"[^"]*"', "", spelled)))
