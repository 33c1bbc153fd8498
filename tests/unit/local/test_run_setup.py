"""Files of a run's folder that a resume changes."""

import datetime
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config import load
from palimpsest.common.resumed_settings import stated, taken
from palimpsest.services.local.run_setup import PreparedRun, prepare_run, restore
from tests.records.stored_runs import a_run

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def prepare(*words: object) -> PreparedRun:
    prepared = prepare_run(load([*map(str, words)], {}, program=""), now=NOW)
    with prepared.lock:
        return prepared


def edited(home: Path, versions: int) -> Path:
    """A run file of the same run with other versions."""
    file = home.parent / "mine.toml"
    text = (home / run_folder.RUN_FILE).read_text()
    file.write_text(
        "\n".join(f"versions = {versions}" if line.startswith("versions = ") else line for line in text.splitlines())
    )
    return file


def test_values_of_a_resume_that_died_are_stated_again(tmp_path: Path, starting_model: Path) -> None:
    """The first resume has already written run.toml, so the second one finds no difference."""
    home = a_run(tmp_path / "first", starting_model)
    prepare("--resume", home)
    file = edited(home, 400)
    for _ in range(2):
        prepare(file, "--resume", home)
        assert stated(home) == {"learner.versions": 400}
    prepare("--resume", home, "--learner.versions=500")
    assert stated(home) == {"learner.versions": 500}
    taken(home)
    prepare("--resume", home)
    assert stated(home) == {}


def test_a_refused_resume_leaves_the_files_as_they_were(tmp_path: Path, starting_model: Path) -> None:
    home = a_run(tmp_path / "first", starting_model)
    prepare("--resume", home)
    saved = (home / run_folder.RUN_FILE).read_bytes()
    refused = prepare("--resume", home, "--learner.versions=500")
    assert (home / run_folder.RUN_FILE).read_bytes() != saved
    restore(refused)
    assert (home / run_folder.RUN_FILE).read_bytes() == saved
    assert stated(home) == {}
