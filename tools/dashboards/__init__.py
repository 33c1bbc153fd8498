"""Grafana dashboards as Python descriptions; `python -m tools.references` writes them to deploy/grafana."""

from tools.dashboards import cost, exactness, pipeline
from tools.dashboards.panels import Dashboard

ALL: tuple[Dashboard, ...] = (pipeline.PIPELINE, exactness.EXACTNESS, cost.COST)
