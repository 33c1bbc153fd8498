"""A run whose plan is made."""

from pathlib import Path

import pytest

from tests.unit.plan.shapes import DENSE


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of DENSE; its folder has no weights."""
    DENSE.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.toml"
    path.write_text(
        f'[model]\npath = "{tmp_path / "model"}"\n[tasks]\nenvironments = {{ add = 1.0 }}\n'
        "[sampling]\nmax_trajectory_tokens = 64\nmax_turn_tokens = 16\n[learner]\nversions = 1\n"
        "micro_batch_tokens = 128\n"
    )
    return path
