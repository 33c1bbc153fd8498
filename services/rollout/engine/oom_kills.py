"""Counts the processes that the kernel has killed for lack of memory, in this process's cgroup or else on the machine.

In a container, the machine's count includes other containers, and the cgroup has its own limit. Both cgroup versions
have a line `oom_kill N`, like /proc/vmstat: version 2 in memory.events, version 1 in memory.oom_control.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def find_counter(proc: Path = _PROC) -> Path | None:
    """Return the most specific file with a count, or None if the kernel has none. `proc`: mount point of procfs."""
    own = candidate_paths(_text(proc / "self/cgroup"), _text(proc / "self/mountinfo"))
    return next((path for path in (*own, proc / "vmstat") if parse_count(_text(path)) is not None), None)


def read_count(path: Path | None) -> int:
    """Return the count in the file; 0 if it cannot be read."""
    return parse_count(_text(path)) or 0 if path is not None else 0


def parse_count(text: str) -> int | None:
    """Parse the number of killed processes from the text of such a file; None if it has no such line.

    >>> parse_count("oom_kill_disable 0\\nunder_oom 0\\noom_kill 3\\n")
    3
    """
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def candidate_paths(cgroup: str, mountinfo: str) -> list[Path]:
    """Return candidate files of this process's cgroup, likeliest first, from /proc/self/cgroup and mountinfo.

    >>> candidate_paths("0::/jobs/7\\n", "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    [PosixPath('/sys/fs/cgroup/jobs/7/memory.events'), PosixPath('/sys/fs/cgroup/memory.events')]
    """
    found: list[Path] = []
    for line in cgroup.splitlines():
        number, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            found[:0] = _mounted_files(own, _mounts(mountinfo, "cgroup", "memory"), "memory.oom_control")
        elif number == "0" and not controllers:
            found += _mounted_files(own, _mounts(mountinfo, "cgroup2", ""), "memory.events")
    return found


def _mounts(mountinfo: str, kind: str, controller: str) -> list[tuple[str, str]]:
    """Return (root inside the file system, mount point) of each matching mount. proc(5) describes the fields."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, options = before.split(), after.split()
        if options[:1] == [kind] and (not controller or controller in options[-1].split(",")):
            found.append((fields[3], fields[4]))
    return found


def _mounted_files(own: str, mounts: Iterable[tuple[str, str]], name: str) -> list[Path]:
    """Return the candidate paths of the file `name` of the cgroup `own`.

    A mount shows its file system from `root` on. In a container, the cgroup may be the mount point itself, even if its
    path on the host is longer.
    """
    found: list[Path] = []
    for root, point in mounts:
        inside = own.removeprefix(root) if own.startswith(root) else own
        found += [Path(point, inside.lstrip("/"), name), Path(point, name)]
    return list(dict.fromkeys(found))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
