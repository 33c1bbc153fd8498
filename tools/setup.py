"""Create what a run needs and this checkout lacks: the environment and the starting model.

Needs Python 3.11 and nothing else. Each part leaves a stamp of what it was made from, so that a second call costs
nothing and a changed requirement is noticed. Downloads are cached by uv outside the checkout.

    python3.11 tools/setup.py            # everything `make run` needs
    python3.11 tools/setup.py --no-model # the environment only
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = ROOT / ".setup"
MODEL = ROOT / "models" / "starting"
UV = "uv==0.13.8"
NEEDED_GB = 9
INSTALLED_GB = {"cpu": 6.6, "gpu": 11.0}
LATEST = "torch and vLLM"


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
    except KeyboardInterrupt:
        print("\nsetup: stopped; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


def environment() -> None:
    """The virtual environment with the pinned requirements of this machine's kind."""
    if sys.version_info[:2] != (3, 11):
        raise Failed(f"this is Python {sys.version.split()[0]}; Palimpsest needs 3.11: make PYTHON=/path/to/python3.11")
    kind = machine()
    pinned = ROOT / "requirements" / f"{kind}.txt"
    stamp = STAMPS / "environment"
    wanted = digest(pinned, ROOT / "pyproject.toml", extra=sys.version + str(ROOT))
    if stamp.is_file() and stamp.read_text() == wanted and (VENV / "bin" / "python").exists():
        return
    started = time.monotonic()
    check_disk(pinned)
    if not (VENV / "bin" / "uv").exists():
        say("creating .venv and installing uv into it")
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "create .venv")
        run([str(VENV / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", UV], "install uv")
    packages = sum(1 for line in pinned.read_text().splitlines() if line and line[0].isalnum())
    say(
        f"installing {packages} packages for a machine {'with a CUDA GPU' if kind == 'gpu' else 'without a CUDA GPU'}: "
        f"about {INSTALLED_GB[kind]} GB, most of it {LATEST}"
    )
    command = [
        str(VENV / "bin" / "uv"),
        "pip",
        "sync",
        "--quiet",
        "--python",
        str(VENV / "bin" / "python"),
        str(pinned),
    ]
    install_with_progress(command, INSTALLED_GB[kind])
    run(
        [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(VENV / "bin" / "python"),
         "--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
        "install palimpsest into .venv",
        env=client_settings(),
    )  # fmt: skip
    write(stamp, wanted)
    say(f"environment ready: {size_gb(VENV):.1f} GB in {time.monotonic() - started:.0f} s")


def starting_model() -> None:
    """The model of examples/embedded.toml: built here, never downloaded."""
    stamp = STAMPS / "starting_model"
    wanted = made_of()
    if stamp.is_file() and stamp.read_text() == wanted and (MODEL / "config.json").exists():
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


def machine() -> str:
    """`gpu` where nvidia-smi lists a device, else `cpu`."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return "gpu" if listed.returncode == 0 and "GPU 0" in listed.stdout else "cpu"


def check_disk(pinned: Path) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    there = size_gb(VENV) if VENV.exists() else 0.0
    if free + there < NEEDED_GB:
        raise Failed(
            f"{free:.1f} GB are free on the disk of {ROOT}, {NEEDED_GB} are needed for {pinned.name}: free some and "
            f"call again (nothing installed so far is lost)"
        )


def install_with_progress(command: list[str], whole_gb: float) -> None:
    """Run uv; show how much of the environment stands, every few seconds."""
    started = shown = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=client_settings(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    got = free_at_start() - shutil.disk_usage(ROOT).free / 1e9
                    say(f"  {max(got, 0):.1f} of up to {whole_gb} GB written, {shown - started:.0f} s")
        _, errors = process.communicate()
    if process.returncode != 0:
        reason = errors.strip().splitlines()[-6:] or [f"uv ended with {process.returncode}"]
        raise Failed(
            "installing the packages failed:\n  " + "\n  ".join(reason) + "\n"
            "check the connection and the disk, then call again: what is already downloaded is kept"
        )


_FREE_AT_START = shutil.disk_usage(ROOT).free / 1e9


def free_at_start() -> float:
    return _FREE_AT_START


def client_settings() -> dict[str, str]:
    """The environment for uv: where pip is told to look and what to trust holds for uv as well."""
    settings = dict(os.environ)
    listed = subprocess.run(
        [str(VENV / "bin" / "pip"), "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    for line in listed.splitlines():
        name, _, quoted = line.partition("=")
        value = quoted.strip("'\"")
        match name.split(".")[-1]:
            case "index-url":
                settings.setdefault("UV_DEFAULT_INDEX", value)
            case "extra-index-url":
                settings.setdefault("UV_INDEX", value)
            case "cert" if Path(value).is_file():
                settings.setdefault("SSL_CERT_FILE", value)
    settings.setdefault("UV_HTTP_TIMEOUT", "180")
    settings.setdefault("UV_LINK_MODE", "hardlink")
    settings.setdefault("UV_NO_PROGRESS", "1")
    # once here, not in each process that imports torch: where PYTHONDONTWRITEBYTECODE is set, as in many containers,
    # that is two to eight seconds each time
    settings.setdefault("UV_COMPILE_BYTECODE", "1")
    settings.pop("VIRTUAL_ENV", None)
    return settings


def run(command: list[str], purpose: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise Failed(f"could not {purpose}:\n  {tail}\nmend that and call again: it goes on from here")


def digest(*files: Path, extra: str = "") -> str:
    return hashlib.sha256(b"\0".join([f.read_bytes() for f in files] + [extra.encode()])).hexdigest()


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
