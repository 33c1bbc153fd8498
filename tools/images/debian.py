"""Gets programs and Debian's Python with apt, once into the cache."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache, commands
from tools.backends.cache import Say

SUITE = "bookworm"
PYTHON = (3, 11)
"""Version of Python of that suite, which the packages of the image must fit."""
MMDEBSTRAP_VERSION = "1.3.5"
PODMAN_VERSION = "4.3.1"
PODMAN = (
    f"podman={PODMAN_VERSION}*",
    *("conmon=2.1.6*", "runc=1.1.5*", "netavark=1.4.0*", "aardvark-dns=1.4.0*", "iptables=1.8.9*"),
    *("golang-github-containers-common", "golang-github-containers-image"),
    *("libassuan0", "libdevmapper1.02.1", "libgpgme11", "libip4tc2", "libip6tc2", "libmnl0", "libnetfilter-conntrack3"),
    *("libnfnetlink0", "libnftnl11", "libseccomp2", "libsubid4", "libxtables12"),
)
"""Podman, its helpers, and the libraries that a Debian may lack. runc, because crun refuses mixed cgroups."""
BASE = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "bubblewrap")
"""What the image takes from Debian, with its dependencies."""
BASE_NAME = f"debian-{SUITE}-python{PYTHON[0]}.{PYTHON[1]}-bubblewrap"
"""Name of that root folder in the cache."""
LIST_PACKAGES = (
    'list="$1/var/lib/dpkg/status.d"; mkdir -p "$list"; for deb in "$1"/var/cache/apt/archives/*.deb; do '
    'dpkg-deb -f "$deb" > "$list/$(dpkg-deb -f "$deb" Package)"; done'
)
"""Records names and versions where scanners of images look for them. mmdebstrap runs it in a shell."""


def announce(text: str) -> None:
    """Print the text on standard error."""
    print(f"images: {text}", file=sys.stderr, flush=True)


def mmdebstrap(say: Say = announce) -> Path:
    """Return the path of mmdebstrap. Raises UserError."""
    packages = (f"mmdebstrap={MMDEBSTRAP_VERSION}*",)
    return _unpacked(f"mmdebstrap-{MMDEBSTRAP_VERSION}", packages, say) / "usr/bin/mmdebstrap"


def podman(say: Say = announce) -> Path:
    """Return the folder in which the files of Podman and its helpers lie as in the root folder. Raises UserError."""
    return _unpacked(f"podman-{PODMAN_VERSION}", PODMAN, say)


def base(say: Say = announce) -> Path:
    """Return the tar file of a root folder with Debian's Python and nothing configured. Raises UserError."""
    program = mmdebstrap(say)

    def make(partial: Path) -> None:
        say(f"downloading Python {PYTHON[0]}.{PYTHON[1]} of Debian {SUITE}: about 25 MB, once")
        _run(
            [str(program), "--quiet", "--variant=extract", f"--include={','.join(BASE)}",
             f"--extract-hook={LIST_PACKAGES}", SUITE, str(partial / "root.tar")],
            "mmdebstrap could not make the root folder", environment={"SOURCE_DATE_EPOCH": "0"},
        )  # fmt: skip

    return cache.made(BASE_NAME, make, say) / "root.tar"


def _unpacked(name: str, packages: Sequence[str], say: Say) -> Path:
    """Return the cache entry with the files of these Debian packages."""

    def make(partial: Path) -> None:
        apt = commands.program("apt-get", f"downloading {name}", "apt (Debian)")
        dpkg = commands.program("dpkg-deb", f"unpacking {name}", "dpkg (Debian)")
        say(f"downloading {name} with apt, once")
        _run(
            [apt, "download", *packages],
            f"apt could not download {name} (run `apt-get update` first; these versions are Debian 12's)",
            folder=partial,
        )
        for package in partial.glob("*.deb"):
            _run([dpkg, "-x", str(package), str(partial)], f"dpkg could not unpack {package.name}")
            package.unlink()

    return cache.made(name, make, say)


def _run(
    command: Sequence[str],
    failure: str,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-commands.LAST_LINES :])
        raise UserError(f"{failure}:\n  {tail}", ExitCode.UNAVAILABLE)
