"""The console command: help, missing and misspelled arguments, exit codes, Ctrl-C, and a closed pipe."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import palimpsest
from palimpsest import cli
from palimpsest.common.control.access import token_line
from tests.processes.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
LIGHT = sorted(cli.COMMANDS)
WITHOUT_ARGUMENTS = {"doctor"}
"""Commands that require no argument."""


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", LIGHT)
def test_help_is_printed(name: str, flag: str) -> None:
    done = run_program("palimpsest", name, flag)
    assert (done.code, done.err) == (0, "")
    assert f"usage: palimpsest {name}" in done.out


@pytest.mark.parametrize("name", sorted(set(LIGHT) - WITHOUT_ARGUMENTS))
def test_a_command_without_its_arguments_prints_its_usage_as_an_error(name: str) -> None:
    done = run_program("palimpsest", name)
    assert (done.code, done.out) == (2, "")
    assert f"usage: palimpsest {name}" in done.err


@pytest.mark.parametrize("name", LIGHT)
def test_an_unknown_flag_is_named(name: str) -> None:
    words = {
        "run": ["examples/embedded.toml"],
        "check": ["examples/embedded.toml"],
        "audit": ["examples/embedded.toml"],
        "acls": ["examples/embedded.toml"],
        "plan": ["examples/embedded.toml", "--gpus=1x80"],
    }
    words |= {
        "dead-letters": ["list", "examples/embedded.toml"],
        "env": ["list"],
        "report": ["runs/a"],
        "rescore": ["runs/a"],
        "store": ["ls", "examples/embedded.toml"],
    }
    done = run_program("palimpsest", name, *words.get(name, []), "--color-scheme=red")
    assert (done.code, done.out) == (2, "")
    assert "color-scheme" in done.err
    assert "Traceback" not in done.err


def test_the_command_alone_prints_the_usage_as_an_error() -> None:
    done = run_program("palimpsest")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: palimpsest COMMAND")


def test_the_version_flag_prints_the_version() -> None:
    assert run_program("palimpsest", "--version").out == f"palimpsest {palimpsest.__version__}\n"


@pytest.mark.parametrize("name", ["fly", "--fly"])
def test_an_unknown_command_is_refused(name: str) -> None:
    done = run_program("palimpsest", name)
    assert done.code == 2
    assert f"palimpsest {name}: there is no such" in done.err


def test_a_report_of_two_folders_is_refused() -> None:
    assert "palimpsest report takes one folder, not 2: a b" in run_program("palimpsest", "report", "a", "b").err


def started(*arguments: str, path: Path | None = None, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start the command as a process; modules in `path` take precedence over installed ones."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-m", "palimpsest", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("module", "command"),
    [("pydantic", ["check", "examples/embedded.toml"]), ("rich", ["run", "examples/embedded.toml"])],
)
def test_ctrl_c_during_an_import_ends_it_without_a_traceback(tmp_path: Path, module: str, command: list[str]) -> None:
    """The import of the module blocks until the signal arrives."""
    (tmp_path / f"{module}.py").write_text("import signal\nprint('imports', flush=True)\nsignal.pause()\n")
    process = started(*command, path=tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize(
    "command", ["--help", "run --help", "check examples/embedded.toml", "audit --help", "doctor", "env list"]
)
def test_a_closed_pipe_ends_the_program_without_output(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = started(*command.split(), stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


def test_help_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, palimpsest.cli; sys.argv = ['palimpsest', '--help']; palimpsest.cli.main(); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('pydantic', 'numpy', 'torch', 'rich')])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_a_new_token_has_the_line_for_the_tokens_file() -> None:
    done = run_program("palimpsest", "token", "ann", "operate")
    assert done.code == 0
    token = done.err.split()[-1]
    assert done.out == f"{token_line('ann', 'operate', token)}\n"
    assert len(token) >= 40
