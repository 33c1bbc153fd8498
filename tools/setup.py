"""Create the environment and the starting model if they are missing or outdated.

Needs only Python 3.11, 3.12 or 3.13. A stamp file holds the digest of the inputs of each part; a part is created again
if its digest changes. uv caches downloads outside the checkout.

    python3.12 -m tools.setup            # environment and starting model
    python3.12 -m tools.setup --no-model # only the environment
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
"""Files of a complete environment."""
STAMPS = ROOT / ".setup"
MODEL = ROOT / "models" / "starting"
UV = "uv==0.13.8"


class Failed(Exception):
    """Raised if setup fails. The message says what to do."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--no-model", action="store_true", help="do not build the starting model")
    options = arguments.parse_args()
    try:
        environment()
        if not options.no_model:
            starting_model()
    except Failed as failure:
        print(f"setup: {failure}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"setup: {error}: fix this and repeat the command; finished steps are kept", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nsetup: stopped; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def environment() -> None:
    """Create the virtual environment with the pinned set of this kind of machine. Raises Failed."""
    kind = kind_of_machine()
    pinned = ROOT / "requirements" / f"{kind}.txt"
    stamp = STAMPS / "environment"
    expected = environment_digest(pinned, ROOT / "pyproject.toml")
    if holds(stamp, expected, *PROGRAMS):
        return
    examine(kind)
    with alone():
        if holds(stamp, expected, *PROGRAMS):
            return  # another setup created it
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        virtual_environment()
        install(kind, pinned)
        write(stamp, expected)
        say(f"environment ready: {size_gb(VENV):.1f} GB in {time.monotonic() - started:.0f} s")


def environment_digest(pinned: Path, project: Path) -> str:
    """Return the digest of the inputs of the environment. pyproject.toml declares console commands and plugins."""
    return digest(pinned, project, extra=json.dumps(origin(), sort_keys=True))


def examine(kind: str) -> None:
    """Check this machine before the download. Prints warnings. Raises Failed with all findings that stop."""
    findings = judge.installation(gather.facts(ROOT, kind))
    stops = [finding.sentence for finding in findings if finding.level == STOPS]
    for finding in findings:
        if finding.level == WARNS:
            say(finding.sentence)
    if stops:
        raise Failed("\nsetup: ".join(stops))


def virtual_environment() -> None:
    """Create .venv with uv, using this Python. Replaces a .venv of another Python, folder or version of uv."""
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
    """Return why the .venv with this record cannot be used, or None if it can."""
    here = origin()
    if not there:
        return "its setup did not finish, or is of an older release"
    if there.get("root") != here["root"]:
        return f"this checkout was moved (from {there.get('root')})"
    if there.get("python") != here["python"]:
        return f"it has Python {there.get('python')}, not {here['python']}"
    if there.get("uv") != here["uv"]:
        return f"it has {there.get('uv')}, not {here['uv']}"
    try:
        for program in ("python", "uv"):
            subprocess.run([str(VENV / "bin" / program), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"its {program} no longer runs"
    return None


def origin() -> dict[str, str]:
    """Return the properties that a virtual environment depends on."""
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
    """Build the model of examples/embedded.toml. Raises Failed."""
    stamp = STAMPS / "starting_model"
    expected = model_digest()
    if holds(stamp, expected, MODEL / "config.json"):
        return
    with alone():
        if holds(stamp, expected, MODEL / "config.json"):
            return
        started = time.monotonic()
        say("building the starting model (a small Qwen3 and its tokenizer, trained to write tool calls)")
        run([str(VENV / "bin" / "python"), "-m", "tools.starting_model", str(MODEL)], "build the starting model")
        write(stamp, expected)
        say(f"starting model ready in {MODEL.relative_to(ROOT)} after {time.monotonic() - started:.0f} s")


def model_digest() -> str:
    """Return the digest of the inputs of the starting model."""
    builder = ROOT / "tools" / "starting_model"
    sources = sorted(builder.glob("*.py")) + sorted((ROOT / "common/environments").glob("*.py"))
    return digest(*sources, extra=(STAMPS / "environment").read_text())


def install_with_progress(command: list[str], total_gb: float) -> None:
    """Run uv and print the installed size every few seconds. Raises Failed."""
    started = shown = time.monotonic()
    free_before, got = shutil.disk_usage(ROOT).free, 0.0
    settings = client_settings(VENV / "bin" / "pip")
    with subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    got = max(got, (free_before - shutil.disk_usage(ROOT).free) / 1e9)  # others may free some
                    say(f"  {got:.1f} of up to {total_gb} GB written, {shown - started:.0f} s")
        _, errors = process.communicate()
    if process.returncode != 0:
        reason = errors.strip().splitlines()[-6:] or [f"uv ended with {process.returncode}"]
        raise Failed(
            "installing the packages failed:\n  " + "\n  ".join(reason) + "\n"
            "check the connection and the disk, then repeat the command; finished downloads are kept"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Lock out other setups of this checkout. The kernel releases the lock when the process ends."""
    STAMPS.mkdir(exist_ok=True)
    with (STAMPS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup of this checkout")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], purpose: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise Failed(f"could not {purpose}:\n  {tail}\nfix this and repeat the command; finished steps are kept")


def digest(*files: Path, extra: str = "") -> str:
    return hashlib.sha256(b"\0".join([f.read_bytes() for f in files] + [extra.encode()])).hexdigest()


def holds(stamp: Path, expected: str, *files: Path) -> bool:
    """Return whether the stamp contains this digest and all files exist."""
    return stamp.is_file() and stamp.read_text() == expected and all(path.exists() for path in files)


def read(record: Path) -> dict[str, str]:
    """Return the record, or {} if the file is missing or incomplete."""
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
