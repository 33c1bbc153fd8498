"""The command line of a sandbox: what the program inside sees.

It sees a read-only Python with its standard library, the programs and libraries of the system, a few devices, and an
empty folder to work in. Nothing else of the machine's files exists inside, and there is no /proc. The packages that are
installed for a Python are hidden, because an environment with its answers may be one of them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from palimpsest.common.sessions.wire import Wire

PROGRAM, WORK = "/program.py", "/work"
SYSTEM = Path("/usr")
SHORT = ("/bin", "/lib", "/lib64")
"""Folders that are links into /usr on most systems."""
HIDDEN_BYTES, SHARED_BYTES = 4096, 2**20
"""Sizes of a hidden folder and of /dev/shm."""
VARIABLES = {
    "PATH": "/usr/bin:/bin",
    "HOME": WORK,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""All variables of the program. A fixed hash seed gives sets the same order in every call."""
LIMITED = (
    "import json,os,resource,sys;"
    "[resource.setrlimit(getattr(resource,name),(most,most)) for name,most in json.loads(sys.argv[1]).items()];"
    "os.execv(sys.executable,[sys.executable,sys.argv[2]])"
)
"""Lowers its limits inside the sandbox, where the kernel counts the processes apart, and becomes the program."""


class Tools(Wire):
    """The programs of which a sandbox is made."""

    bwrap: str
    """Path of bubblewrap."""
    python: str = sys.executable
    """Python that runs the programs; a link, such as that of a virtual environment, is followed."""


def command(tools: Tools, limits: dict[str, int], *, source: int, status: int, folder_bytes: int) -> list[str]:
    """Return the command line.

    limits: name of a limit in the module `resource` -> its value. source, status: file descriptors, of the program's
    text and of bubblewrap's reports.
    """
    python = Path(tools.python).resolve()
    words = [
        *(tools.bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv"),
        *(word for name, value in VARIABLES.items() for word in ("--setenv", name, value)),
        *_system(python.parents[1]),
        *("--dev", "/dev", "--size", str(SHARED_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),  # noqa: S108
        *("--ro-bind-data", str(source), PROGRAM),
        *("--size", str(folder_bytes), "--tmpfs", WORK, "--chdir", WORK),
        *("--remount-ro", "/", "--json-status-fd", str(status)),
    ]
    return [*words, "--", str(python), "-S", "-c", LIMITED, json.dumps(limits), PROGRAM]


def _system(prefix: Path) -> Iterator[str]:
    """Yield the options that show programs and libraries. prefix: of Python."""
    shown = []
    for root in dict.fromkeys((SYSTEM, prefix)):
        shown += [root / name for name in ("bin", "lib", "lib64") if (root / name).is_dir()]
    shown += [Path(name) for name in SHORT if Path(name).is_dir() and not Path(name).is_symlink()]
    for folder in shown:
        yield from ("--ro-bind", str(folder), str(folder))
    for name in SHORT:
        if Path(name).is_symlink():
            yield from ("--symlink", str(Path(name).readlink()), name)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    for folder in shown:
        for packages in sorted(folder.glob("python*/*-packages")):
            yield from ("--size", str(HIDDEN_BYTES), "--tmpfs", str(packages), "--remount-ro", str(packages))
