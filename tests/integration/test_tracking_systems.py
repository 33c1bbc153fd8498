"""wandb offline and mlflow with SQLite: a run that is started twice is one run. Packages of their own, in the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.backends import cache
from tools.setup import UV_PROGRAM

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
PACKAGES = ("wandb==0.31.0", "mlflow-skinny==3.17.2", "sqlalchemy", "alembic")
"""sqlalchemy and alembic: of the package mlflow, for its database."""


@pytest.fixture(scope="module")
def packages() -> Path:
    """Folder with both systems, apart from the versions that requirements/ pins."""

    def install(partial: Path) -> None:
        subprocess.run(
            [UV_PROGRAM, "pip", "install", "-q", "--python", sys.executable, "--target", partial, *PACKAGES], check=True
        )

    name = "-".join(["tracking", *(package.replace("==", "-") for package in PACKAGES[:2])])
    return cache.made(name, install, print)


def tracked(packages: Path, kind: str, folder: Path) -> Any:
    """Return what the system holds after both starts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.track", kind, folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(packages), "WANDB_MODE": "offline", "HOME": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wandb_writes_both_starts_under_one_id(packages: Path, tmp_path: Path) -> None:
    assert tracked(packages, "wandb", tmp_path / "wandb") == [["run-r.wandb", True]] * 2


def test_mlflow_holds_one_run_with_the_values_of_both_starts(packages: Path, tmp_path: Path) -> None:
    expected = ["r", "FINISHED", [[1, 0.25], [2, 0.5], [3, 0.75]]]
    assert tracked(packages, "mlflow", tmp_path / "mlflow") == expected
