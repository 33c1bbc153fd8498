"""Downloads the headless Chromium of Debian with apt, once into the cache, for the tests of the page."""

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.backends import cache
from tools.backends.cache import Say
from tools.backends.commands import program, run
from tools.backends.downloads import announce

PACKAGE = "chromium-headless-shell"
NAME = "chromium-debian-12"
"""The cache entry. Debian replaces a Chromium by the next one, so that no version can be pinned."""
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu")


@dataclass(frozen=True, slots=True)
class Chromium:
    """A browser that a program can drive."""

    program: Path
    environment: Mapping[str, str]
    """Variables that it needs."""


def chromium(say: Say = announce) -> Chromium:
    """Return the browser. Raises UserError."""
    folder = cache.made(NAME, lambda partial: _get(partial, say), say)
    libraries = [folder / name / sub for name in LIBRARIES for sub in ("", "pulseaudio")]
    return Chromium(
        folder / "usr/lib/chromium" / PACKAGE,
        {**os.environ, "LD_LIBRARY_PATH": ":".join(str(path) for path in libraries if path.is_dir())},
    )


def _get(partial: Path, say: Say) -> None:
    """Fill the folder with the package and those that it needs and the system lacks."""
    apt = program("apt-get", "downloading Chromium", "apt (Debian)")
    dpkg = program("dpkg-deb", "unpacking Chromium", "dpkg (Debian)")
    say("downloading Chromium with apt: about 100 MB, once")
    started = time.monotonic()
    archives = partial / "archives"
    (archives / "partial").mkdir(parents=True)
    run(
        [
            apt, "-y", "--no-install-recommends", "--download-only", "--reinstall",
            "-o", f"Dir::Cache::archives={archives}", "-o", "Debug::NoLocking=true", "install", PACKAGE,
        ],
        f"apt could not download {PACKAGE} (run `apt-get update` first; on another system than Debian, put the program "
        f"into {partial.with_suffix('') / 'usr/lib/chromium'})",
        {}, lambda _lines, passed: say(f"  downloading, {passed:.0f} s"),
    )  # fmt: skip
    for package in archives.glob("*.deb"):
        run([dpkg, "-x", str(package), str(partial)], "dpkg could not unpack Chromium", {}, lambda *_: None)
    shutil.rmtree(archives)
    for name in ("doc", "man", "lintian", "locale"):
        shutil.rmtree(partial / "usr/share" / name, ignore_errors=True)
    say(f"Chromium is ready: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")
