"""The dashboards of deploy/grafana: generated, read by Grafana's schema; their queries parse and show every series."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import PROMETHEUS, ROOT
from tests.deploy.series import SUFFIXES, code_series, series_in
from tools import dashboards
from tools.backends import downloads
from tools.dashboards.panels import COLUMNS, Dashboard

GRAFANA = ROOT / "deploy" / "grafana"
FOR_DEBUGGING = {"process_virtual_memory_bytes", "process_max_fds"}
"""Series that no panel and no rule needs."""
PARTS = sorted({suffix for group in SUFFIXES.values() for suffix in group if suffix}, key=len)


def queries() -> list[str]:
    return [query for dashboard in dashboards.ALL for panel in dashboard.panels for query in panel.queries.values()]


def rule_expressions() -> list[str]:
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yaml"))]
    return [rule["expr"] for content in files for group in content["groups"] for rule in group["rules"]]


def metric_of(series: str) -> str:
    """Name of the metric of a series, as docs/metrics.md has it."""
    return re.sub(f"({'|'.join(PARTS)})$", "", series) if series not in documented() else series


def documented() -> set[str]:
    return set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))


def test_the_folder_has_the_generated_files_and_no_other() -> None:
    """`python -m tools.references` writes them."""
    expected = {f"{one.name}.json": one.json() for one in dashboards.ALL}
    assert {path.name: path.read_text() for path in GRAFANA.iterdir()} == expected


@pytest.mark.thorough
def test_the_schema_of_grafana_knows_every_field_and_misses_none(tmp_path: Path) -> None:
    """It reads strictly: queries of Prometheus and options of time series too."""
    read = read_strictly(*sorted(GRAFANA.iterdir()))
    assert read.returncode == 0, read.stdout
    spoilt = json.loads(dashboards.ALL[0].json())
    panel = next(one for one in spoilt["panels"] if one["type"] == "timeseries")
    del panel["options"]["tooltip"]["sort"]
    panel["targets"][0]["interval_s"] = 15
    spoilt["titel"] = spoilt["title"]
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(spoilt))
    refused = read_strictly(path)
    assert refused.returncode == 1
    assert "options.tooltip.sort: required field is missing" in refused.stdout
    assert "unexpected field 'interval_s'" in refused.stdout
    assert "unexpected field 'titel'" in refused.stdout


def read_strictly(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([downloads.dashboard_reader(), *paths], capture_output=True, text=True, check=False)


def test_promtool_parses_every_query(promtool: Callable[..., Any], tmp_path: Path) -> None:
    rules = [{"record": "panel", "expr": query.replace("$__rate_interval", "1m")} for query in queries()]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", "--lint=none", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_the_queries_use_only_series_of_the_services() -> None:
    known = code_series()
    assert {name for query in queries() for name in series_in(query)} - known == set()


def test_every_metric_is_documented_and_in_a_panel_or_a_rule() -> None:
    metrics = {metric_of(series) for series in code_series()}
    assert metrics == documented()
    shown = {metric_of(name) for expression in (*queries(), *rule_expressions()) for name in series_in(expression)}
    assert metrics - shown == FOR_DEBUGGING


@pytest.mark.parametrize("dashboard", dashboards.ALL, ids=lambda one: one.name)
def test_panels_have_a_place_of_their_own_and_queries_that_follow_the_variables(dashboard: Dashboard) -> None:
    model = json.loads(dashboard.json())
    cells = [
        (x, y)
        for panel in model["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < COLUMNS
    assert {variable["name"] for variable in model["templating"]["list"]} == {"datasource", "run"}
    panels = [panel for panel in model["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in model["panels"]}) == len(model["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels) == len(dashboard.panels)
    for panel in panels:
        assert panel["description"]
        for target in panel["targets"]:
            selectors = len(re.findall(r"(palimpsest|process)_", target["expr"]))
            assert target["expr"].count('run=~"$run"') == selectors, target["expr"]
