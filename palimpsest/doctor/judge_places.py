"""Checks of folders, OpenMP and ports. Pure."""

from __future__ import annotations

from palimpsest.doctor import support
from palimpsest.doctor.facts import Facts, Place, Port
from palimpsest.doctor.findings import GB, MB, OK, STOPS, WARNS, Finding

LEAST_FREE, LITTLE_FREE = 200 * MB, 2 * GB
"""Free disk that a run needs to start, and below which a long run may fill the disk."""


def checkout(facts: Facts) -> Finding:
    """A checkout that `make setup` can write to."""
    assert facts.checkout, "an installed package has none"
    return _written("Checkout", facts.checkout, "`make setup` writes .venv, .setup and models there.")


def disk_to_install(facts: Facts) -> Finding:
    """Enough disk for the environment and its downloads."""
    assert facts.checkout, "an installed package has none"
    needed, free = support.NEEDED_GB[facts.kind] * GB, facts.checkout.free
    value = f"{free / GB:.1f} GB free on the disk of {facts.checkout.path}"
    if facts.checkout.without_storage:
        value = f"{facts.checkout.path} is on a {facts.checkout.without_storage} file system, which has no disk"
        return Finding("Disk", value, STOPS, "The environment cannot be stored there.", "Use a checkout on a disk.")
    if free < needed:
        return Finding(
            "Disk", value, STOPS, f"The environment and its downloads need {needed / GB:.0f} GB.",
            "Free disk space and repeat the command; finished downloads are kept.",
        )  # fmt: skip
    return Finding("Disk", value)


def download_cache(facts: Facts) -> Finding:
    """A writable cache with space for the downloads."""
    found = _written("Cache", facts.cache, "uv keeps its downloads there.", "Name another in UV_CACHE_DIR.")
    if found.level == OK and facts.cache.free < support.INSTALLED_GB[facts.kind] * GB:
        return Finding(
            "Cache", found.value, WARNS, f"The downloads take up to {support.INSTALLED_GB[facts.kind]} GB there.",
            "Free disk space, or name another folder in UV_CACHE_DIR.",
        )  # fmt: skip
    return found


def run_folder(facts: Facts) -> Finding:
    """A writable run folder with space for a run."""
    remedy = "Name another: --run.folder=/path" + (" (make run ARGS=--run.folder=/path)." if facts.checkout else ".")
    found = _written("Run folder", facts.run_folder, "A run keeps its log, versions and report there.", remedy)
    return found if found.level == STOPS else _room(found, facts.run_folder, remedy)


def temporary(facts: Facts) -> Finding:
    """A writable temporary folder with space for torch and vLLM."""
    found = _written("Temporary folder", facts.temporary, "torch and vLLM write there.", "Name another in TMPDIR.")
    return found if found.level == STOPS else _room(found, facts.temporary, "Name another in TMPDIR.")


def omp(facts: Facts) -> Finding:
    """A valid OMP_NUM_THREADS, if it is set."""
    text = facts.environment.get("OMP_NUM_THREADS")
    check = "OMP_NUM_THREADS"
    if text is None:
        return Finding(check, "not set")
    count = text.split(",")[0].strip()
    if not count.isdecimal() or int(count) == 0:
        return Finding(
            check, repr(text), WARNS, "OpenMP ignores this value: it is not a number of threads.", "Unset it."
        )
    if int(count) > facts.cpus + 0.5:
        return Finding(
            check, text, WARNS, f"More threads than the {facts.cpus:g} usable processors wait for each other.",
            "Unset it.",
        )  # fmt: skip
    return Finding(check, text)


def ports(facts: Facts) -> list[Finding]:
    """Return a finding for each port that the configuration fixes."""
    return [_port(port) for port in facts.ports]


def _port(port: Port) -> Finding:
    value = f"{port.key} = {port.address}"
    if not port.taken:
        return Finding("Port", f"{value} is free")
    return Finding(
        "Port", f"{value} is in use, or no address of this machine", STOPS, "The service cannot listen there.",
        f"End the program that listens there, or set another --{port.key}=.",
    )  # fmt: skip


def _written(check: str, place: Place, purpose: str, otherwise: str = "") -> Finding:
    value = f"{place.path}, {place.free / GB:.1f} GB free"
    if place.without_storage:
        return Finding(
            check, f"{place.path} is on a {place.without_storage} file system, which stores no files", STOPS, purpose,
            otherwise or "Use a folder on a disk.",
        )  # fmt: skip
    if place.read_only_mount:
        return Finding(
            check, f"{place.path} is on a read-only file system", STOPS, purpose,
            otherwise or "Mount it for writing, or use a copy elsewhere.",
        )  # fmt: skip
    if not place.writable:
        of = f", which belongs to {place.owner}" if place.owner else ""
        return Finding(
            check, f"{place.path}{of}, cannot be written to", STOPS, purpose,
            otherwise or "Change its permissions (chown, chmod), or use your own copy.",
        )  # fmt: skip
    if place.owner:
        return Finding(
            check, f"{value}, belongs to {place.owner}", WARNS, "New files there will belong to you.",
            f"Work as {place.owner}, or in a folder of your own.",
        )  # fmt: skip
    return Finding(check, value)


def _room(found: Finding, place: Place, remedy: str) -> Finding:
    if place.free < LEAST_FREE:
        return Finding(found.check, found.value, STOPS, "A run cannot start.", f"Free disk space. {remedy}")
    if place.free < LITTLE_FREE:
        return Finding(found.check, found.value, WARNS, "A long run may fill the disk.", f"Free disk space. {remedy}")
    return found
