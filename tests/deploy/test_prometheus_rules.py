"""The rules of deploy/prometheus are valid, use series of the services, and fire on their symptom only."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import PROMETHEUS
from tests.deploy.series import code_series, series_in

RULES = sorted((PROMETHEUS / "rules").glob("*.yaml"))
TESTED = sorted((PROMETHEUS / "tests").glob("*.yaml"))
Promtool = Callable[..., Any]


def rules_of(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts_of(path: Path) -> list[str]:
    return [rule["alert"] for rule in rules_of(path) if "alert" in rule]


def test_promtool_accepts_the_rules_and_the_configuration(promtool: Promtool) -> None:
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rules found") == len(RULES)


@pytest.mark.parametrize("tests", TESTED, ids=lambda path: path.stem)
def test_alerts_fire_on_their_series_and_on_no_other(tests: Path, promtool: Promtool) -> None:
    done = promtool("test", "rules", tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    tested = {path.stem: [test["name"] for test in yaml.safe_load(path.read_text())["tests"]] for path in TESTED}
    assert tested == {path.stem: alerts_of(path) for path in RULES if path.stem in tested}
    assert sum(map(len, tested.values())) == sum(len(alerts_of(path)) for path in RULES)


@pytest.mark.parametrize("condition", ["vector(1)", "vector(1) > 1"], ids=["always", "never"])
@pytest.mark.parametrize("tests", TESTED, ids=lambda path: path.stem)
def test_an_alert_that_fires_always_or_never_fails_its_test(
    tests: Path, condition: str, promtool: Promtool, tmp_path: Path
) -> None:
    copy = tmp_path / "prometheus"
    shutil.copytree(PROMETHEUS, copy)
    changed = copy / "rules" / tests.name
    content = yaml.safe_load(changed.read_text())
    for rule in content["groups"][0]["rules"]:
        rule["expr"] = condition
    changed.write_text(yaml.safe_dump(content))
    done = promtool("test", "rules", copy / "tests" / tests.name)
    failed = {name for name in alerts_of(changed) if re.search(rf"alertname: ?{name}\b", done.stdout + done.stderr)}
    assert failed == set(alerts_of(changed))


def test_the_rules_use_only_series_of_the_services_and_of_the_recording_rules() -> None:
    known = code_series() | {rule["record"] for path in RULES for rule in rules_of(path) if "record" in rule}
    used = {name: path.stem for path in RULES for rule in rules_of(path) for name in series_in(rule["expr"])}
    assert {name: where for name, where in used.items() if name not in known} == {}
