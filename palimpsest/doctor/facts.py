"""Facts about a machine. gather.py collects them; judge.py evaluates them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Place:
    """A folder to write to. If it does not exist, the fields describe its nearest existing ancestor."""

    path: str
    free: int
    """Bytes that this user can write."""
    writable: bool = True
    read_only_mount: bool = False
    without_storage: str = ""
    """Type of a file system that stores no files, such as proc or sysfs; empty for other file systems."""
    owner: str = ""
    """Name of the owner, if it is another user; empty for our own folder."""


@dataclass(frozen=True)
class Interpreter:
    """The Python that creates or runs the environment."""

    version: tuple[int, int, int]
    implementation: str = "cpython"
    free_threaded: bool = False
    bits: int = 64
    has_venv: bool = True
    has_headers: bool = True
    path: str = "python3"


@dataclass(frozen=True)
class Port:
    """A port that the configuration of the run fixes."""

    key: str
    address: str
    taken: bool


class TemplateProof(NamedTuple):
    """Whether the chat template of a run's model renders what a worker needs."""

    model: str
    chosen: str = ""
    """model.chat_template; empty for the model's own."""
    ends: Sequence[str] = ()
    """Texts of the tokens that end a model message."""
    refused: str = ""
    """The error with which a worker refuses the model at its start."""
    refuses_system: str = ""
    """The template's error for a system message."""
    unproven: str = ""
    """Why nothing was proven."""


@dataclass(frozen=True)
class Facts:
    """Input of the checks. Sizes are bytes."""

    kind: str
    """`cpu` or `gpu`: selects the pinned set."""
    python: Interpreter
    system: str
    machine: str
    libc: tuple[str, tuple[int, int]]
    """`glibc` or `musl`, and its version."""
    cpu_model: str
    cpu_flags: frozenset[str]
    cpus: float
    """Processors that this process can use, under the quota of the control group."""
    amx: str
    """`absent`, `permitted` or `refused`, as the kernel reports."""
    gpus: tuple[str, ...]
    driver: str
    """Version of the NVIDIA driver; empty without a driver."""
    driver_hidden: bool
    """Whether a driver is loaded but nvidia-smi lists no GPU."""
    memory: int
    memory_free: int
    memory_limited_by: str
    """`the machine` or `the control group`."""
    shared_memory: int
    """Free bytes of /dev/shm; -1 if it does not exist."""
    processes_left: int | None
    """Processes and threads that can still be started; None without a limit."""
    open_files: int
    today: datetime.date
    environment: Mapping[str, str]
    checkout: Place | None
    """The folder that `make setup` installs into; None for an installed package."""
    run_folder: Place
    cache: Place
    temporary: Place
    compiler: bool
    built_before: bool
    """Whether the cache of uv has the wheel that needs a C compiler."""
    ports: tuple[Port, ...] = ()
    template: TemplateProof | None = None
    """None: no run file was named, or no environment to prove it in exists."""
    tracking: str = ""
    """`tracking.kind` of the run, if its package is not installed; empty otherwise."""
    bubblewrap_missing: bool = False
    """Whether `env_gateway.code_tools` of the run needs bubblewrap and it is not on the PATH."""
    engine: str = ""
    """Version of vLLM, if Palimpsest is an installed package; empty without vLLM and for a checkout."""
