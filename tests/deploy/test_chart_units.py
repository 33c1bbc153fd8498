"""The suites of helm-unittest in the chart, which its users can run without Python."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import CHART
from tools.backends import downloads

pytestmark = pytest.mark.thorough
SUITES = sorted((CHART / "tests").glob("*_test.yaml"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_a_suite_of_the_chart_passes(suite: Path) -> None:
    done = run(CHART, suite)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = suite.read_text().count("  - it: ")
    assert re.search(rf"Tests:\s+{tests} passed, {tests} total", done.stdout), done.stdout


def test_a_wrong_expectation_fails(tmp_path: Path) -> None:
    (wrong,) = [path for path in SUITES if path.stem == "workers_test"]
    suite = tmp_path / "wrong_test.yaml"
    text = wrong.read_text().replace("path: spec.completions, value: 1", "path: spec.completions, value: 2")
    suite.write_text(text.replace("../values", str(CHART / "values")))
    assert "spec.completions" in (done := run(CHART, suite)).stdout
    assert done.returncode != 0


def run(chart: Path, suite: Path) -> subprocess.CompletedProcess[str]:
    command = [str(downloads.helm_unittest()), "--file", str(suite), str(chart)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
