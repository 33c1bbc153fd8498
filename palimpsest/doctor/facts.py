"""What is known of a machine. gather.py finds it out, judge.py says what it means."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A folder that is written to, or that will be made below the nearest one that exists."""

    path: str
    free: int
    """Bytes that this user may still write there."""
    writable: bool = True
    read_only_mount: bool = False
    without_storage: str = ""
    """Type of the file system, if it is one that stores no files, such as proc or sysfs; else empty."""
    owner: str = ""
    """Name of the user whom it belongs to, where that is another; empty where it is ours."""


@dataclass(frozen=True)
class Interpreter:
    """The Python that is asked to make or run the environment."""

    version: tuple[int, int, int]
    implementation: str = "cpython"
    free_threaded: bool = False
    bits: int = 64
    has_venv: bool = True
    has_headers: bool = True
    path: str = "python3"


@dataclass(frozen=True)
class Port:
    """A port that the run file fixes."""

    key: str
    address: str
    taken: bool


@dataclass(frozen=True)
class Facts:
    """Everything that the checks look at. Sizes are bytes."""

    kind: str
    """`cpu` or `gpu`: which pinned set this machine gets."""
    python: Interpreter
    system: str
    machine: str
    libc: tuple[str, tuple[int, int]]
    """`glibc` or `musl`, and its version."""
    cpu_model: str
    cpu_flags: frozenset[str]
    cpus: float
    """Processors that this process may use, the control group's quota counted."""
    amx: str
    """`absent`, `permitted`, or `refused`: the kernel's answer."""
    gpus: tuple[str, ...]
    driver: str
    """Version of the NVIDIA driver; empty without one."""
    driver_hidden: bool
    """A driver is loaded, and nvidia-smi does not say so."""
    memory: int
    memory_free: int
    memory_limited_by: str
    """`the machine` or `the control group`."""
    shared_memory: int
    """Free bytes of /dev/shm; -1 where there is none."""
    processes_left: int | None
    """How many more processes and threads may be started; None without a limit."""
    open_files: int
    today: datetime.date
    environment: Mapping[str, str]
    checkout: Place | None
    """The folder that `make setup` installs into; None where Palimpsest is an installed package without one."""
    run_folder: Place
    cache: Place
    temporary: Place
    compiler: bool
    built_before: bool
    """What a C compiler would have to build is in uv's cache."""
    ports: tuple[Port, ...] = ()
    engine: str = ""
    """Version of vLLM beside an installed package; empty without one. Not looked up for a checkout."""
