"""The chart's objects for Prometheus and Grafana have the rules and dashboards of the repository."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import PROMETHEUS, Rendered
from tools import dashboards

pytestmark = pytest.mark.thorough
Render = Callable[..., Rendered]
OPERATOR = ("--api-versions", "monitoring.coreos.com/v1")
ALL = tuple(f"--set=monitoring.{part}.enabled=true" for part in ("podMonitor", "rules", "dashboards"))
LABELS = "--set=monitoring.podMonitor.labels.release=prometheus,monitoring.rules.labels.release=prometheus"


@pytest.fixture
def monitored(render: Render) -> Rendered:
    return render("minimal", *OPERATOR, *ALL, LABELS, "--set=runId=demo")


def test_without_the_switches_nothing_is_created(render: Render) -> None:
    plain = render("minimal")
    assert not plain.of("PodMonitor")
    assert not plain.of("PrometheusRule")
    assert not any("grafana_dashboard" in one["metadata"]["labels"] for one in plain.of("ConfigMap").values())


def test_the_monitor_selects_every_pod_of_the_services_and_names_the_run(monitored: Rendered) -> None:
    (monitor,) = monitored.of("PodMonitor").values()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    selector, (endpoint,) = monitor["spec"]["selector"], monitor["spec"]["podMetricsEndpoints"]
    (components,) = selector["matchExpressions"]
    for name, pod in monitored.pods.items():
        labels = pod["metadata"]["labels"]
        assert selector["matchLabels"].items() <= labels.items(), name
        if labels[components["key"]] in components["values"]:
            ports = [port["name"] for one in pod["spec"]["containers"] for port in one.get("ports", ())]
            assert endpoint["port"] in ports or "learner" in name, name  # only rank 0 of the learner has the port
    assert endpoint["relabelings"] == [{"targetLabel": "run", "replacement": "demo"}]


def test_the_rule_object_has_every_rule(monitored: Rendered) -> None:
    (rules,) = monitored.of("PrometheusRule").values()
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yaml"))]
    assert rules["spec"]["groups"] == [group for content in files for group in content["groups"]]


def test_each_dashboard_has_a_config_map_that_the_sidecar_of_grafana_finds(monitored: Rendered) -> None:
    found = {
        name: content
        for one in monitored.of("ConfigMap").values()
        if one["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, content in one["data"].items()
    }
    assert {name: json.loads(content) for name, content in found.items()} == {
        f"palimpsest-{one.name}.json": json.loads(one.json()) for one in dashboards.ALL
    }


@pytest.mark.parametrize("part", ["podMonitor", "rules"])
def test_objects_of_an_operator_that_the_cluster_lacks_are_refused(part: str, template: Callable[..., Any]) -> None:
    done = template("minimal", f"--set=monitoring.{part}.enabled=true")
    assert done.returncode != 0
    assert "the cluster does not have monitoring.coreos.com/v1: install the Prometheus operator" in done.stderr
