"""The command line, as far as it goes without starting anything."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.refusal import Refusal
from services.__main__ import program
from services.local import words

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(RUN + f'run.folder = "{tmp_path}"\n')
    return tmp_path / "mine.toml"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["services", *map(str, arguments)])
    program()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["examples/embedded.toml", "--help"]])
def test_help_explains_every_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    call(monkeypatch, *arguments)
    said = capsys.readouterr().out
    for form in ("RUN.toml", "--check", "--resume FOLDER", "--SECTION.KEY=VALUE", "report FOLDER"):
        assert form in said


@pytest.mark.parametrize("arguments", [[], ["report"], ["report", "--help"], ["report", "a", "b"]])
def test_what_cannot_be_understood_is_answered_with_the_usage(monkeypatch: pytest.MonkeyPatch, arguments: list[str]):
    with pytest.raises(Refusal, match="usage: python -m services"):
        call(monkeypatch, *arguments)


def test_check_prints_the_resolved_run_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_file: Path
):
    call(monkeypatch, run_file, "--check", "--learner.versions=7")
    said = capsys.readouterr().out
    assert "versions = 7" in said
    assert "canary_tolerance" in said
    assert list(run_file.parent.iterdir()) == [run_file]


def test_a_report_is_of_a_runs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(Refusal, match="no run's folder"):
        call(monkeypatch, "report", tmp_path)


def test_help_and_check_do_not_wait_for_heavy_libraries():
    heavy = ("torch", "transformers", "vllm", "plotly")
    code = f"import sys, services.__main__; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_the_run_that_make_runs_goes_on_by_make_alone():
    said = words.resume(Path("runs/r1"), Path("examples/embedded.toml"), [])
    assert 'make run ARGS="--resume runs/r1"' in said
    assert "python -m services --resume runs/r1" in said


@pytest.mark.parametrize(
    ("source", "overrides"), [("examples/embedded.toml", ["--learner.versions=6"]), ("mine.toml", [])]
)
def test_a_run_of_its_own_kind_goes_on_by_its_own_file(source: str, overrides: list[str]):
    assert 'make run RUN= ARGS="--resume runs/r1"' in words.resume(Path("runs/r1"), Path(source), overrides)


def test_a_run_on_a_cluster_goes_on_with_the_clusters_command() -> None:
    said = words.resume(Path("runs/r1"), Path("examples/cluster.toml"), [])
    assert said == '  make run-cluster ARGS="--resume runs/r1"'
    assert "run-cluster RUN= ARGS" in words.resume(Path("runs/r1"), Path("examples/cluster.toml"), ["--run.seed=1"])


def test_the_result_is_told_in_short():
    summary = json.loads(
        """{"versions": 200, "seconds": {"setup": 31.2, "run": 195.0}, "trajectories": {"trained": 51200},
            "success_first": 0.0246, "success_last": 0.9912}"""
    )
    assert words.made(summary, Path("runs/r1")).splitlines() == [
        "200 versions in 3 min 15 s (and 31 s to start)",
        "success 0.025 -> 0.991 (first and last tenth of 51,200 trajectories)",
        "report: runs/r1/report.html",
        "summary: runs/r1/summary.json",
    ]
    assert words.made({"versions": 0}, Path("runs/r1")).startswith("report:")


@pytest.mark.parametrize("command", ["services audit --help", "services.learner dead-letters --help"])
def test_a_reader_that_has_read_enough_ends_the_program_without_a_word(command: str):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
