"""The command line up to the start of the services."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest import cli
from palimpsest.cli import dispatch
from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.user_error import UserError
from palimpsest.services.local import console_text
from palimpsest.services.local.run_setup import resolve
from tests.runs.run_process import ROOT

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(RUN + f'run.folder = "{tmp_path}"\n')
    return tmp_path / "mine.toml"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["palimpsest", *map(str, arguments)])
    dispatch()


@pytest.mark.parametrize("arguments", [["run", "--help"], ["run", "-h"], ["run", "examples/embedded.toml", "--help"]])
def test_help_explains_every_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    call(monkeypatch, *arguments)
    output = capsys.readouterr().out
    for form in ("RUN.toml", "--check", "--resume FOLDER", "--SECTION.KEY=VALUE"):
        assert form in output


def test_every_command_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    call(monkeypatch, "--help")
    output = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", output, re.MULTILINE) for name in cli.COMMANDS)


def test_a_misspelled_command_names_the_nearest_one(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        UserError, match=r"palimpsest adit: there is no such command; did you mean `palimpsest audit`\?"
    ):
        call(monkeypatch, "adit")


def test_check_prints_the_resolved_run_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_file: Path
):
    call(monkeypatch, "run", run_file, "--check", "--learner.versions=7")
    output = capsys.readouterr().out
    assert "versions = 7" in output
    assert "rollout_workers" in output
    assert list(run_file.parent.iterdir()) == [run_file]


def test_a_report_of_a_folder_without_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(UserError, match="not the folder of a run"):
        call(monkeypatch, "report", tmp_path)


def test_help_and_check_import_no_large_libraries():
    heavy = ("torch", "transformers", "vllm", "plotly")
    code = f"import sys, palimpsest.cli, palimpsest.run; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


EMBEDDED, CLUSTER, HOME = "examples/embedded.toml", "examples/cluster.toml", Path("runs/r1")
BY_HAND = "  .venv/bin/palimpsest run --resume runs/r1"
BY_CLUSTER = '  make run-cluster RUN="runs/r1/run.toml" ARGS="--resume runs/r1"'


@pytest.mark.parametrize(
    ("source", "overrides", "kafka", "by_make", "command"),
    [
        (EMBEDDED, [], False, True, '  make run ARGS="--resume runs/r1"'),
        (EMBEDDED, [], False, False, BY_HAND),
        (EMBEDDED, ["--learner.versions=6"], False, True, BY_HAND),
        ("mine.toml", [], False, True, BY_HAND),
        ("mine.toml", [], True, True, BY_HAND),
        (CLUSTER, [], True, True, '  make run-cluster ARGS="--resume runs/r1"'),
        (CLUSTER, ["--run.seed=1"], True, True, BY_CLUSTER),
        ("runs/r1/run.toml", [], True, True, BY_CLUSTER),
        (CLUSTER, [], True, False, BY_HAND),
    ],
)
def test_the_resume_command_matches_the_way_the_run_started(
    source: str, overrides: list[str], kafka: bool, by_make: bool, command: str
):
    assert command == console_text.resume(
        HOME, Path(source), overrides, kafka=kafka, by_make=by_make, program=".venv/bin/palimpsest"
    )


@pytest.mark.parametrize("name", ["plain", "with space", "it's $HOME", "a'\"b"])
@pytest.mark.parametrize(
    ("source", "overrides"), [(EMBEDDED, []), (CLUSTER, []), (CLUSTER, ["--run.seed=1"]), ("x", [])]
)
def test_the_printed_command_works_when_pasted(tmp_path: Path, name: str, source: str, overrides: list[str]):
    """The arguments are read by the program's own loader; a make command is replaced by the last line of its recipe."""
    home = tmp_path / name / "r1"
    home.mkdir(parents=True)
    run = load([EMBEDDED if source == "x" else source, "--run.id=r1"], {}, program="").config
    (home / "run.toml").write_text(to_toml(run))
    command = console_text.resume(
        home, Path(source), overrides, kafka=source == CLUSTER, by_make=source != "x", program=".venv/bin/palimpsest"
    ).strip()
    if command.startswith("make "):
        recipe = shell(f"{command} --dry-run").splitlines()[-1]
        command = recipe[recipe.index(".venv/bin/palimpsest run ") :]
    assert command.startswith(".venv/bin/palimpsest run ")
    arguments = shell(command.replace(".venv/bin/palimpsest run", "printf '%s\\n'")).splitlines()
    assert resolve(load(arguments, {}, program="")).run.home == home


def shell(command: str) -> str:
    """Return the output of the command.

    The variables of `make test` are removed; with them, a make below would print the folder it enters.
    """
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_result_has_a_short_text():
    summary = json.loads(
        """{"versions": 200, "seconds": {"setup": 31.2, "run": 195.0}, "trajectories": {"trained": 51200},
            "success_first": 0.0246, "success_last": 0.9912, "reward_first": 0.101, "reward_last": 0.9949,
            "stored": {"versions": 200, "bytes": 16800000, "full_bytes": 46848000, "share": 0.35861}}"""
    )
    assert console_text.format_result(summary, Path("runs/r1")).splitlines() == [
        "200 versions in 3 min 15 s (and 31 s to start)",
        "success 0.025 -> 0.991, reward 0.101 -> 0.995 (first and last tenth of 51,200 trajectories)",
        "200 versions stored in 16.8 MB (46.8 MB as full copies)",
        "report: runs/r1/report.html",
        "summary: runs/r1/summary.json",
    ]
    assert console_text.format_result({"versions": 0}, Path("runs/r1")).startswith("report:")
