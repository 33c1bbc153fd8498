"""The Dockerfiles use the pinned packages and the user of the chart. No test builds them: that needs Docker."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "docker"
HELPERS = (ROOT / "deploy/helm/palimpsest/templates/_helpers.tpl").read_text()


@pytest.mark.parametrize("kind", ["light", "gpu"])
def test_an_image_is_pinned_and_runs_as_the_user_of_the_chart(kind: str) -> None:
    text = (FOLDER / f"{kind}.Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:3\.12-(slim-)?bookworm", base) for base in bases)
    assert f"COPY requirements/{kind}.txt" in text
    assert (ROOT / "requirements" / f"{kind}.txt").is_file()
    user = re.search(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user is not None
    assert f"runAsUser: {user[1]}\n" in HELPERS
    assert f"runAsGroup: {user[2]}\n" in HELPERS


@pytest.mark.parametrize("kind", ["light", "gpu"])
def test_the_build_context_has_what_the_wheel_needs(kind: str) -> None:
    kept = {
        line[1:] for line in (FOLDER / f"{kind}.Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert kept >= {"palimpsest", "common", "services", "pyproject.toml", "README.md", "LICENSE", "requirements"}
    assert all((ROOT / name).exists() for name in kept)


def test_the_chart_names_the_images_that_the_dockerfiles_build() -> None:
    images = yaml.safe_load((ROOT / "deploy/helm/palimpsest/values.yaml").read_text())["images"]
    version = yaml.safe_load((ROOT / "deploy/helm/palimpsest/Chart.yaml").read_text())["appVersion"]
    for kind in ("light", "gpu"):
        assert f"-t {images[kind]['repository']}:{version} ." in (FOLDER / f"{kind}.Dockerfile").read_text()
