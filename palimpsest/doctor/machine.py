"""Reads facts from the kernel and the drivers (Linux)."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ASK_FOR_AMX = """
import ctypes
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
raise SystemExit(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) != 0)
"""
SMI_TIMEOUT_S = 1.5
UNLIMITED = 1 << 60
"""Control groups version 1 report a number near 2**63 if there is no limit."""


def kind_of_machine() -> str:
    """Return `gpu` if nvidia-smi lists a device, else `cpu`."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return "gpu" if listed.returncode == 0 and "GPU 0" in listed.stdout else "cpu"


def gpus() -> tuple[tuple[str, ...], str]:
    """Return the names of the GPUs and the version of the driver. Both are empty if nvidia-smi fails or times out."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=SMI_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return (), ""
    rows = [line.split(", ") for line in output.splitlines() if ", " in line]
    return tuple(row[0] for row in rows), rows[0][1] if rows else ""


def driver_loaded() -> bool:
    """Return whether the kernel has loaded an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists()


def cpu() -> tuple[str, frozenset[str]]:
    """Return the name of the processor and its feature flags."""
    model, flags = platform.machine(), frozenset()  # type: tuple[str, frozenset[str]]
    for line in text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            break
    return model, flags


def cpus() -> float:
    """Return the number of processors that this process can use."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota, period = (text(group("cpu", "cpu.max")) or "max 1").split()[:2]
    if quota == "max":
        quota = text(group("cpu", "cpu.cfs_quota_us")) or "-1"
        period = text(group("cpu", "cpu.cfs_period_us")) or "1"
    return allowed if int(quota) <= 0 else min(allowed, int(quota) / int(period))


def amx(flags: frozenset[str]) -> str:
    """Return whether the kernel permits AMX tiles. A child process asks, so this process gets no permission."""
    if "amx_tile" not in flags:
        return "absent"
    done = subprocess.run([sys.executable, "-S", "-c", ASK_FOR_AMX], capture_output=True, check=False)
    return "permitted" if done.returncode == 0 else "refused"


def memory() -> tuple[int, int, str]:
    """Return total bytes, free bytes, and the source of the limit."""
    lines = (line.split() for line in text("/proc/meminfo").splitlines())
    table = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1}
    total, free = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    limit = number(group("memory", "memory.max")) or number(group("memory", "memory.limit_in_bytes"))
    if limit is None or limit >= min(total, UNLIMITED):
        return total, free, "the machine"
    used = number(group("memory", "memory.current")) or number(group("memory", "memory.usage_in_bytes")) or 0
    statistics = (line.split() for line in text(group("memory", "memory.stat")).splitlines())
    reclaimable = sum(int(line[1]) for line in statistics if line[0] in ("inactive_file", "active_file"))
    return limit, min(free, limit - used + reclaimable), "the control group"


def processes_left() -> int | None:
    """Return how many processes and threads ulimit -u and the control group still permit; None without a limit."""
    left = []
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:  # the limit does not apply to root
        left.append(limit - _threads_of(os.getuid()))
    maximum = number(group("pids", "pids.max"))
    if maximum is not None:
        left.append(maximum - (number(group("pids", "pids.current")) or 0))
    return min(left) if left else None


def _threads_of(user: int) -> int:
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                total += sum(1 for _ in (process / "task").iterdir())
        except OSError:
            continue
    return total


def open_files() -> int:
    """Return the hard limit of open files. Programs can raise the soft limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 30 if hard == resource.RLIM_INFINITY else hard


def libc() -> tuple[str, tuple[int, int]]:
    """Return name and version of the C library. The version of musl is (0, 0), because musl does not report it."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")  # "glibc 2.39"
    except (ValueError, OSError):
        version = None
    if not version:
        return "musl", (0, 0)
    name, _, numbers = version.partition(" ")
    major, minor = numbers.split(".")[:2]
    return name, (int(major), int(minor))


def group(controller: str, name: str) -> str:
    """Return the path of a control group file: of the group of this process if visible, else of the visible root."""
    own = root = ""
    for line in text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, own = "/sys/fs/cgroup", path
        if controller in controllers.split(","):
            root, own = f"/sys/fs/cgroup/{controller}", path
            break
    for candidate in (f"{root}{own.rstrip('/')}/{name}", f"{root}/{name}", f"/sys/fs/cgroup/{name}"):
        if Path(candidate).exists():
            return candidate
    return ""


def number(path: str) -> int | None:
    """Return the number in a file, or None without a file or a number."""
    content = text(path).strip()
    return int(content) if content.isdigit() else None


def text(path: str) -> str:
    """Return the text of a file, or an empty string if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace") if path else ""
    except OSError:
        return ""
