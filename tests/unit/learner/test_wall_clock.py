"""The learner decides nothing by the wall clock, so a step of it by an hour changes only what people read."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOR_DISPLAYS = {
    "services/learner/loop.py": "published_at of an announcement",
    "services/learner/ingest/dead_letter_writer.py": "buried_at of a dead letter",
    "services/learner/control/build.py": "the time of day on the page",
    "services/learner/tracking/mlflow_run.py": "timestamps of metrics at the tracking server",
    "common/control/desk.py": "requested_at of a change",
    "services/learner/control/run_control.py": "requested_at of a change that the command line states",
    "common/outages.py": "since and until of an outage in /v1/status",
}
"""File that reads the wall clock -> the field that it fills. docs/messages.md: such fields are for displays only."""


def reads_wall_clock(path: Path) -> bool:
    """Whether the module names `time.time`, or `now`, `utcnow` or `today` of a date."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner, node.attr) == ("time", "time") or (
                owner.rpartition(".")[2] in ("datetime", "date") and node.attr in ("now", "utcnow", "today")
            ):
                return True
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            return any(name.name == "time" for name in node.names)
    return False


def modules() -> Iterator[Path]:
    for folder in ("services/learner", "common"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_the_learner_uses_the_wall_clock_only_for_displays() -> None:
    found = {str(path.relative_to(ROOT)) for path in modules() if reads_wall_clock(path)}
    assert found == set(FOR_DISPLAYS)
