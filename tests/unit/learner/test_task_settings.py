"""The offers of a run state its resolved limits."""

import json
from pathlib import Path

from palimpsest.common.config.schema import RunConfig
from palimpsest.services.learner.coordinator import _task_settings


def test_offers_state_the_trajectory_limit_of_the_model_if_the_run_sets_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    run = {"model": {"path": str(tmp_path)}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 1}}
    assert _task_settings(RunConfig.model_validate(run)).sampling.max_trajectory_tokens == 2047
    limited = RunConfig.model_validate(run | {"sampling": {"max_trajectory_tokens": 900}})
    assert _task_settings(limited).sampling.max_trajectory_tokens == 900
