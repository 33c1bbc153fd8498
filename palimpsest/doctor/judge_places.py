"""Checks of the places a run writes to, and of what stands between its services. Pure."""

from __future__ import annotations

from palimpsest.doctor import support
from palimpsest.doctor.facts import Facts, Place, Port
from palimpsest.doctor.findings import GB, MB, OK, STOPS, WARNS, Finding

LEAST_FREE, LITTLE_FREE = 200 * MB, 2 * GB
"""Disk below which no run begins, and below which a long run may fill it."""
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def checkout(facts: Facts) -> Finding:
    """A checkout that `make setup` can write to."""
    assert facts.checkout, "an installed package has none"
    return _written("Checkout", facts.checkout, "`make setup` writes .venv, .setup and models there.")


def disk_to_install(facts: Facts) -> Finding:
    """Enough disk for the environment and its downloads."""
    assert facts.checkout, "an installed package has none"
    needed, free = support.NEEDED_GB[facts.kind] * GB, facts.checkout.free
    value = f"{free / GB:.1f} GB free on the disk of {facts.checkout.path}"
    if free < needed:
        return Finding(
            "Disk", value, STOPS, f"The environment, downloads included, needs {needed / GB:.0f} GB.",
            "Free some and call again; what is already downloaded is kept.",
        )  # fmt: skip
    return Finding("Disk", value)


def download_cache(facts: Facts) -> Finding:
    """A writable cache with room for the downloads."""
    found = _written("Cache", facts.cache, "uv keeps its downloads there.", "Name another in UV_CACHE_DIR.")
    if found.level == OK and facts.cache.free < support.INSTALLED_GB[facts.kind] * GB:
        return Finding(
            "Cache", found.value, WARNS, f"The downloads take up to {support.INSTALLED_GB[facts.kind]} GB there.",
            "Free some, or name another folder in UV_CACHE_DIR.",
        )  # fmt: skip
    return found


def run_folder(facts: Facts) -> Finding:
    """A writable run folder with room for a run."""
    remedy = "Name another: --run.folder=/path" + (" (make run ARGS=--run.folder=/path)." if facts.checkout else ".")
    found = _written("Run folder", facts.run_folder, "A run keeps its log, versions and report there.", remedy)
    return found if found.level == STOPS else _room(found, facts.run_folder, remedy)


def temporary(facts: Facts) -> Finding:
    """A writable temporary folder with room for what torch and vLLM put there."""
    found = _written("Temporary folder", facts.temporary, "torch and vLLM write there.", "Name another in TMPDIR.")
    return found if found.level == STOPS else _room(found, facts.temporary, "Name another in TMPDIR.")


def omp(facts: Facts) -> Finding:
    """A usable OMP_NUM_THREADS, where it is set."""
    text = facts.environment.get("OMP_NUM_THREADS")
    check = "OMP_NUM_THREADS"
    if text is None:
        return Finding(check, "not set")
    first = text.split(",")[0].strip()
    if not first.isdecimal() or int(first) == 0:
        return Finding(check, repr(text), WARNS, "That is no number of threads; OpenMP ignores it.", "Unset it.")
    if int(first) > facts.cpus + 0.5:
        return Finding(
            check, text, WARNS, f"More threads than the {facts.cpus:g} usable processors wait for each other.",
            "Unset it.",
        )  # fmt: skip
    return Finding(check, text)


def proxies(facts: Facts) -> Finding:
    """No proxy between the services of this machine."""
    given = [name for name in PROXIES if facts.environment.get(name)]
    if not given:
        return Finding("Proxy", "none")
    without = facts.environment.get("no_proxy", facts.environment.get("NO_PROXY", ""))
    hosts = {host.strip().split(":")[0] for host in without.split(",")}
    if "*" in hosts or "127.0.0.1" in hosts:
        return Finding("Proxy", f"{given[0]} is set, 127.0.0.1 is left out")
    return Finding(
        "Proxy", f"{given[0]} is set, and no_proxy does not name 127.0.0.1", STOPS,
        "The services' requests to each other on this machine would go to the proxy.",
        'Export no_proxy="127.0.0.1,localhost" (and what it has now).',
    )  # fmt: skip


def ports(facts: Facts) -> list[Finding]:
    """One finding for each port that the run file fixes."""
    return [_port(port) for port in facts.ports]


def _port(port: Port) -> Finding:
    value = f"{port.key} = {port.address}"
    if not port.taken:
        return Finding("Port", f"{value} is free")
    return Finding(
        "Port", f"{value} is taken, or no address of this machine", STOPS, "The service could not listen there.",
        f"End what listens there, or give another --{port.key}=.",
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
            otherwise or "Change its rights (chown, chmod), or use a copy of your own.",
        )  # fmt: skip
    if place.owner:
        return Finding(
            check, f"{value}, belongs to {place.owner}", WARNS, "What is written there will not belong to them.",
            f"Work as {place.owner}, or in a folder of your own.",
        )  # fmt: skip
    return Finding(check, value)


def _room(found: Finding, place: Place, remedy: str) -> Finding:
    if place.free < LEAST_FREE:
        return Finding(found.check, found.value, STOPS, "A run could not even begin.", f"Free some. {remedy}")
    if place.free < LITTLE_FREE:
        return Finding(found.check, found.value, WARNS, "A long run may fill it.", f"Free some. {remedy}")
    return found
