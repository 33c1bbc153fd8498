"""How many processes the kernel has killed for want of memory: of this process's cgroup, else of the machine.

In a container the machine's count is about others as well, and the limit that matters is the cgroup's. Both versions of
cgroups count in a line `oom_kill N`, as /proc/vmstat does: version 2 in memory.events, version 1 in memory.oom_control.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def find_counter(proc: Path = _PROC) -> Path | None:
    """The file to count in, the closest to this process; None: this kernel counts nowhere. `proc`: where procfs is."""
    own = candidate_paths(_text(proc / "self/cgroup"), _text(proc / "self/mountinfo"))
    return next((path for path in (*own, proc / "vmstat") if parse_count(_text(path)) is not None), None)


def read_count(path: Path | None) -> int:
    """What stands there now; 0 where nothing can be read."""
    return parse_count(_text(path)) or 0 if path is not None else 0


def parse_count(text: str) -> int | None:
    """The number of processes killed, from such a file's text; None if it does not say.

    >>> counted("oom_kill_disable 0\\nunder_oom 0\\noom_kill 3\\n")
    3
    """
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def candidate_paths(cgroup: str, mountinfo: str) -> list[Path]:
    """Where this process's cgroup may count, likeliest first: from the texts of /proc/self/cgroup and mountinfo.

    >>> places("0::/jobs/7\\n", "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
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
    """(root inside the file system, mount point) of each such mount; proc(5) tells of the fields."""
    found = []
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        told, options = fields.split(), rest.split()
        if options[:1] == [kind] and (not controller or controller in options[-1].split(",")):
            found.append((told[3], told[4]))
    return found


def _mounted_files(own: str, mounts: Iterable[tuple[str, str]], name: str) -> list[Path]:
    """A mount shows its file system from `root` on. A container's own cgroup may be the mount point itself, whatever
    path the host knows it by."""
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
