"""Create what a run needs and this checkout lacks: the environment and the starting model.

Needs Python 3.11, 3.12 or 3.13 and nothing else. Each part leaves a stamp of what it was made from, so that a second
call costs nothing and a changed requirement is noticed. Downloads are cached by uv outside the checkout.

    python3.12 -m tools.setup            # everything `make run` needs
    python3.12 -m tools.setup --no-model # the environment only
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palimpsest.doctor import gather, judge, support
from palimpsest.doctor.findings import STOPS, WARNS
from palimpsest.doctor.machine import kind_of_machine
from tools.pip_settings import client_settings

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
UV_PROGRAM = VENV / "bin" / "uv"
PROGRAMS = (VENV / "bin" / "python", VENV / "bin" / "palimpsest")
"""What a finished environment has."""
STAMPS = ROOT / ".setup"
MODEL = ROOT / "models" / "starting"
UV = "uv==0.13.8"


class Failed(Exception):
    """Setting up cannot go on; the message says what to do."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--no-model", action="store_true", help="leave the starting model out")
    options = arguments.parse_args()
    try:
        environment()
        if not options.no_model:
            starting_model()
    except Failed as failure:
        print(f"setup: {failure}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"setup: {error}: mend that and call again; it goes on from here", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nsetup: stopped; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


def environment() -> None:
    """The virtual environment with the pinned requirements of this machine's kind."""
    kind = kind_of_machine()
    pinned = ROOT / "requirements" / f"{kind}.txt"
    stamp = STAMPS / "environment"
    wanted = made_from(pinned, ROOT / "pyproject.toml")
    if holds(stamp, wanted, *PROGRAMS):
        return
    examine(kind)
    with alone():
        if holds(stamp, wanted, *PROGRAMS):
            return  # another setup made it
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        virtual_environment()
        install(kind, pinned)
        write(stamp, wanted)
        say(f"environment ready: {size_gb(VENV):.1f} GB in {time.monotonic() - started:.0f} s")


def made_from(pinned: Path, project: Path) -> str:
    """Digest of all that the environment follows from; the project's file names its console commands and plugins."""
    return digest(pinned, project, extra=json.dumps(origin(), sort_keys=True))


def examine(kind: str) -> None:
    """Say what this machine lacks, before anything is downloaded. Raises Failed with every finding that stops."""
    findings = judge.installation(gather.facts(ROOT, kind))
    stops = [finding.sentence for finding in findings if finding.level == STOPS]
    for finding in findings:
        if finding.level == WARNS:
            say(finding.sentence)
    if stops:
        raise Failed("\nsetup: ".join(stops))


def virtual_environment() -> None:
    """.venv with uv in it, made by this Python in this folder; one that was made otherwise is replaced."""
    record = STAMPS / "venv.json"
    there = read(record)
    if VENV.exists() and (reason := unusable(there)) is None:
        return
    if VENV.exists():
        say(f"replacing .venv: {reason}")
    else:
        say(f"creating .venv with Python {platform.python_version()} and installing uv into it")
    record.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(VENV)], "create .venv")
    run([str(VENV / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", UV], "install uv")
    write(record, json.dumps(origin()))


def unusable(there: dict[str, str]) -> str | None:
    """Why the .venv that has this record cannot be used; None if it can."""
    here = origin()
    if not there:
        return "the setup that made it did not finish, or was an older one"
    if there.get("root") != here["root"]:
        return f"this checkout was moved (from {there.get('root')})"
    if there.get("python") != here["python"]:
        return f"it has Python {there.get('python')}, and {here['python']} is asked for"
    if there.get("uv") != here["uv"]:
        return f"it has {there.get('uv')}, and {here['uv']} is wanted"
    try:
        for program in ("python", "uv"):
            subprocess.run([str(VENV / "bin" / program), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"its {program} no longer runs"
    return None


def origin() -> dict[str, str]:
    """What a virtual environment is bound to."""
    return {"root": str(ROOT), "python": platform.python_version(), "uv": UV}


def install(kind: str, pinned: Path) -> None:
    packages = sum(1 for line in pinned.read_text().splitlines() if line and line[0].isalnum())
    say(
        f"installing {packages} packages for a machine {'with a CUDA GPU' if kind == 'gpu' else 'without a CUDA GPU'}: "
        f"about {support.INSTALLED_GB[kind]} GB, most of it torch and vLLM"
    )
    python = str(VENV / "bin" / "python")
    install_with_progress(
        [str(UV_PROGRAM), "pip", "sync", "--quiet", "--python", python, str(pinned)], support.INSTALLED_GB[kind]
    )
    run(
        [str(UV_PROGRAM), "pip", "install", "--quiet", "--python", python,
         "--no-deps", "--no-build-isolation", "--reinstall-package", "palimpsest", "--editable", str(ROOT)],
        "install palimpsest into .venv",
        env=client_settings(VENV / "bin" / "pip"),
    )  # fmt: skip


def starting_model() -> None:
    """The model of examples/embedded.toml: built here, never downloaded."""
    stamp = STAMPS / "starting_model"
    wanted = made_of()
    if holds(stamp, wanted, MODEL / "config.json"):
        return
    with alone():
        if holds(stamp, wanted, MODEL / "config.json"):
            return
        started = time.monotonic()
        say("building the starting model (a small Qwen3 and its tokenizer, taught the format of a tool call)")
        run([str(VENV / "bin" / "python"), "-m", "tools.starting_model", str(MODEL)], "build the starting model")
        write(stamp, wanted)
        say(f"starting model ready in {MODEL.relative_to(ROOT)} after {time.monotonic() - started:.0f} s")


def made_of() -> str:
    """Digest of all that the starting model follows from."""
    builder = ROOT / "tools" / "starting_model"
    sources = sorted(builder.glob("*.py")) + sorted((ROOT / "services/env_gateway/environments").glob("*.py"))
    return digest(*sources, extra=(STAMPS / "environment").read_text())


def install_with_progress(command: list[str], whole_gb: float) -> None:
    """Run uv; show how much of the environment stands, every few seconds."""
    started = shown = time.monotonic()
    free_before = shutil.disk_usage(ROOT).free
    settings = client_settings(VENV / "bin" / "pip")
    with subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    got = (free_before - shutil.disk_usage(ROOT).free) / 1e9
                    say(f"  {max(got, 0):.1f} of up to {whole_gb} GB written, {shown - started:.0f} s")
        _, errors = process.communicate()
    if process.returncode != 0:
        reason = errors.strip().splitlines()[-6:] or [f"uv ended with {process.returncode}"]
        raise Failed(
            "installing the packages failed:\n  " + "\n  ".join(reason) + "\n"
            "check the connection and the disk, then call again: what is already downloaded is kept"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Hold off other setups of this checkout. The lock goes with the process."""
    STAMPS.mkdir(exist_ok=True)
    with (STAMPS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another setup of this checkout is at work; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], purpose: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise Failed(f"could not {purpose}:\n  {tail}\nmend that and call again: it goes on from here")


def digest(*files: Path, extra: str = "") -> str:
    return hashlib.sha256(b"\0".join([f.read_bytes() for f in files] + [extra.encode()])).hexdigest()


def holds(stamp: Path, wanted: str, *made: Path) -> bool:
    """Whether what the stamp speaks of was made from what is wanted, and all of it is there."""
    return stamp.is_file() and stamp.read_text() == wanted and all(path.exists() for path in made)


def read(record: Path) -> dict[str, str]:
    """What a record holds; nothing where there is none or it was cut short."""
    try:
        return dict(json.loads(record.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def write(stamp: Path, text: str) -> None:
    stamp.parent.mkdir(exist_ok=True)
    partial = stamp.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(stamp)


def size_gb(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink()) / 1e9


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
