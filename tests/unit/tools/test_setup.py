"""`make setup`: replacing an unusable .venv, pip's settings for uv, and the choice of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup
from tools.pip_settings import translated

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "python.sh"


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A usable .venv."""
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "uv"):
        program(folder / "bin" / name, "exit 0")
    monkeypatch.setattr(setup, "VENV", folder)
    return folder


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    """Write a program that tools/python.sh takes for a Python of this version."""
    return program(path, f'if [ "$1" = -c ]; then echo {version}; else echo "{path.name} runs $*"; fi')


def chosen(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tools/python.sh with only the programs of this folder on the PATH."""
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *words], cwd=folder, env={"PATH": str(folder), **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_a_venv_of_this_python_and_folder_is_kept(venv: Path) -> None:
    assert setup.unusable(setup.origin()) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"python": "3.10.2"}, "it has Python 3.10.2"),
        ({"root": "/before"}, "was moved (from /before)"),
        ({"uv": "uv==0.1"}, "it has uv==0.1"),
    ],
)
def test_a_venv_of_another_origin_is_replaced_with_a_reason(venv: Path, changed: dict[str, str], reason: str) -> None:
    assert reason in str(setup.unusable({**setup.origin(), **changed}))


def test_a_venv_without_a_record_is_incomplete(venv: Path) -> None:
    assert "did not finish" in str(setup.unusable({}))


@pytest.mark.parametrize("name", ["python", "uv"])
def test_a_venv_whose_programs_do_not_run_is_replaced(venv: Path, name: str) -> None:
    (venv / "bin" / name).unlink()
    assert f"its {name} no longer runs" in str(setup.unusable(setup.origin()))


def test_a_truncated_record_is_empty(tmp_path: Path) -> None:
    record = tmp_path / "venv.json"
    assert setup.read(record) == {}
    record.write_text('{"python": "3.1')
    assert setup.read(record) == {}


@pytest.fixture
def checkout(venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout after setup; its next setup appends "install" to `calls` and installs nothing."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("")
    (tmp_path / "pyproject.toml").write_text("[project.scripts]\n")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "STAMPS", tmp_path / ".setup")
    monkeypatch.setattr(setup, "PROGRAMS", (venv / "bin" / "python", venv / "bin" / "palimpsest"))
    monkeypatch.setattr(setup, "kind_of_machine", lambda: "cpu")
    monkeypatch.setattr(setup, "examine", lambda kind: None)

    def install(kind: str, pinned: Path) -> None:
        program(venv / "bin" / "palimpsest", "exit 0")
        with (tmp_path / "calls").open("a") as calls:
            calls.write("install\n")

    monkeypatch.setattr(setup, "install", install)
    monkeypatch.setattr(setup, "virtual_environment", lambda: None)
    setup.environment()
    assert installs(tmp_path) == 1
    return tmp_path


def installs(checkout: Path) -> int:
    return len((checkout / "calls").read_text().splitlines())


def test_an_existing_environment_is_not_installed_again(checkout: Path) -> None:
    setup.environment()
    assert installs(checkout) == 1


def test_changed_entry_points_are_installed(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text('[project.scripts]\npalimpsest = "palimpsest.cli:main"\n')
    setup.environment()
    setup.environment()
    assert installs(checkout) == 2


def test_an_environment_without_the_console_command_is_installed_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "palimpsest").unlink()
    setup.environment()
    assert installs(checkout) == 2


def test_pips_settings_apply_to_uv(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("")
    listed = (
        "global.index-url='https://first.example/simple'\nglobal.extra-index-url='https://a.example https://b.example'\n"
        f"install.find-links='\\n/wheels\\n/more'\n:env:.no-index='1'\nglobal.cert='{certificate}'\n"
    )
    settings = translated(listed, {"HOME": "/ada", "VIRTUAL_ENV": "/other"})
    assert settings["UV_DEFAULT_INDEX"] == "https://first.example/simple"
    assert settings["UV_INDEX"] == "https://a.example https://b.example"
    assert settings["UV_FIND_LINKS"] == "/wheels,/more"
    assert settings["UV_NO_INDEX"] == "1"
    assert settings["SSL_CERT_FILE"] == str(certificate)
    assert settings["HOME"] == "/ada"
    assert "VIRTUAL_ENV" not in settings


def test_settings_of_uv_override_those_of_pip() -> None:
    listed = "global.index-url='https://first.example/simple'\n"
    assert (
        translated(listed, {"UV_DEFAULT_INDEX": "https://mine.example"})["UV_DEFAULT_INDEX"] == "https://mine.example"
    )


def test_the_first_python_that_runs_is_chosen(tmp_path: Path) -> None:
    program(tmp_path / "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    python(tmp_path / "python3.13", "3.13.2")
    python(tmp_path / "python3", "3.9.1")
    assert chosen(tmp_path, "-m", "tools.setup").stdout == "python3.13 runs -m tools.setup\n"


def test_a_named_python_overrides_all_others(tmp_path: Path) -> None:
    python(tmp_path / "python3.11", "3.11.7")
    mine = python(tmp_path / "mine", "3.12.1")
    assert chosen(tmp_path, "x", PYTHON=str(mine)).stdout == "mine runs x\n"


def test_an_unsuitable_named_python_is_refused(tmp_path: Path) -> None:
    python(tmp_path / "python3.11", "3.11.7")
    old = python(tmp_path / "old", "3.8.18")
    for name, word in ((str(old), "is Python 3.8.18"), ("/no/such", "does not run")):
        done = chosen(tmp_path, "x", PYTHON=name, GOALS="run")
        assert (done.returncode, done.stdout) == (3, "")
        assert word in done.stderr
        assert "make run PYTHON=" in done.stderr


def test_without_a_suitable_python_the_found_ones_are_named(tmp_path: Path) -> None:
    python(tmp_path / "python3", "3.9.18")
    done = chosen(tmp_path, "x")
    assert (done.returncode, done.stdout) == (3, "")
    assert "(python3 is 3.9.18)" in done.stderr


def test_the_doctor_runs_on_an_older_python_if_there_is_no_other(tmp_path: Path) -> None:
    python(tmp_path / "python3", "3.9.18")
    assert chosen(tmp_path, "x", ANY_PYTHON="1").stdout == "python3 runs x\n"


def test_the_python_of_the_venv_is_kept(tmp_path: Path) -> None:
    """Otherwise every `make run` would replace a .venv made with a named Python."""
    python(tmp_path / "python3.11", "3.11.7")
    base = python(tmp_path / "base", "3.12.1")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program(tmp_path / ".venv" / "bin" / "python", f"echo {base}")
    assert chosen(tmp_path, "x").stdout == "base runs x\n"


def test_the_real_python_of_a_venv_is_found() -> None:
    done = chosen(SCRIPT.parents[1], "-c", "import sys; print(sys.prefix == sys.base_prefix)", PATH=os.environ["PATH"])
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert sys.version_info >= (3, 11)
