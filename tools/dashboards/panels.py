"""Panels, rows and dashboards, and their JSON for Grafana. Pure.

Every expression filters by the label `run` of the targets, which the dashboard's variable `run` selects.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, COLUMNS = 8, 8, 24
SCHEMA = 39
"""Version of the JSON model of Grafana 10."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A time series panel. queries: legend -> PromQL; a legend may hold `{{label}}`."""

    title: str
    unit: str
    queries: Mapping[str, str]
    says: str
    """What to look for."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard: titles of its rows, each with its panels."""

    name: str
    title: str
    rows: Mapping[str, Sequence[Panel]]

    @property
    def panels(self) -> list[Panel]:
        """All panels, in order."""
        return [panel for row in self.rows.values() for panel in row]

    def json(self) -> str:
        """Return the file that Grafana imports."""
        return json.dumps(self._model(), indent=1) + "\n"

    def _model(self) -> dict[str, Any]:
        placed: list[dict[str, Any]] = []
        y = 0
        for title, row in self.rows.items():
            where = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
            heading = {"id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
            placed.append({**heading, "gridPos": where})
            y += 1
            for i, panel in enumerate(row):
                where = {"h": HEIGHT, "w": WIDTH, "x": i * WIDTH % COLUMNS, "y": y + i * WIDTH // COLUMNS * HEIGHT}
                placed.append(_panel(panel, len(placed) + 1, where))
            y += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
        return {
            "uid": f"palimpsest-{self.name}",
            "title": f"Palimpsest: {self.title}",
            "tags": ["palimpsest"],
            "schemaVersion": SCHEMA,
            "editable": True,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "templating": {"list": [_DATASOURCE, _RUN]},
            "annotations": {"list": []},
            "panels": placed,
        }


def gauge(name: str, by: str = "run", *, how: str = "max") -> str:
    """Return the query of a gauge."""
    return f"{how} by ({by}) (palimpsest_{name}{RUN})"


def rate(counter: str, by: str = "run") -> str:
    """Return the query of a counter's rate per second."""
    return f"sum by ({by}) (rate(palimpsest_{counter}_total{RUN}{RATE}))"


def spent(histogram: str, by: str = "run") -> str:
    """Return the query of the seconds per second that a histogram of durations adds up to."""
    return f"sum by ({by}) (rate(palimpsest_{histogram}_sum{RUN}{RATE}))"


def mean(histogram: str, by: str = "run") -> str:
    """Return the query of a histogram's mean."""
    return f"{spent(histogram, by)} / sum by ({by}) (rate(palimpsest_{histogram}_count{RUN}{RATE}))"


def quantile(share: float, histogram: str, by: str = "run") -> str:
    """Return the query of a histogram's quantile."""
    return f"histogram_quantile({share}, sum by (le, {by}) (rate(palimpsest_{histogram}_bucket{RUN}{RATE})))"


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DATASOURCE = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
_RUN = {
    "name": "run",
    "label": "Run",
    "type": "query",
    "datasource": _SOURCE,
    "query": {"query": "label_values(palimpsest_build_info, run)", "refId": "run"},
    "refresh": 2,
    "includeAll": True,
    "allValue": ".*",
    "multi": True,
    "current": {"text": ["All"], "value": ["$__all"]},
}


def _panel(panel: Panel, number: int, where: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": _SOURCE,
        "gridPos": where,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }
