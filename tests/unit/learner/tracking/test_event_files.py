"""TensorBoard: real event files, read back with TensorBoard's own reader."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.tracking import build
from palimpsest.services.learner.tracking.build import build_tracking
from tests.processes.waiting import LIMIT_S
from tests.records.history_lines import a_line

pytestmark = pytest.mark.thorough


def config(folder: Path, **tracking: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"id": "r", "folder": folder},
            "model": {"path": "m"},
            "tasks": {"environments": {"lookup": 1.0}},
            "learner": {"versions": 3},
            "tracking": tracking,
        }
    )


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_a_restart_goes_on_in_the_same_run_without_the_undone_version(tmp_path: Path) -> None:
    """Versions 1 to 3 are logged; the checkpoint holds 2, so a restart trains version 3 again."""
    lines = [a_line(version, reward=version / 4) for version in range(4)]
    first = build_tracking(config(tmp_path, kind="tensorboard"))
    first.begin([])
    for line in lines[:3]:
        first.add(line)
    first.close(limit_s=LIMIT_S)
    again = build_tracking(config(tmp_path, kind="tensorboard"))
    again.begin(lines[:2])
    again.add(lines[2] | {"reward": 1.0})
    again.add(lines[3])
    again.close(limit_s=LIMIT_S)
    assert series(tmp_path / "r" / "tracking", "reward") == [(1, 0.0), (2, 0.25), (3, 1.0), (4, 0.75)]


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tracking(config(tmp_path)).close()  # none is needed
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(
        UserError,
        match=r"mlflow needs a package of this name, which is not installed: pip install 'palimpsest\[mlflow\]'",
    ):
        build_tracking(config(tmp_path, kind="mlflow"))
