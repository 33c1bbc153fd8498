"""The programs themselves: Kafka's jars by Maven, MinIO by Go; each got once into the cache."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache
from tools.backends.cache import Say

Progress = Callable[[Sequence[str], float], None]
"""Told every few seconds: what the program has printed so far, and the seconds passed."""
POM = Path(__file__).parent / "pom.xml"
MINIO_MODULE = "github.com/minio/minio"
MINIO_VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
"""The newest that Go's module proxy has; of 2026-02-12."""
COPY_JARS = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
"""Named in full: by its short name, a missing connection reads as a missing plugin."""
OLDEST_JAVA, OLDEST_GO = 17, (1, 21)
"""MinIO asks for Go 1.24, which a Go from 1.21 on gets for itself."""
SHOWN_EVERY_S = 10.0
LAST_LINES = 12


def announce(text: str) -> None:
    """Say it on standard error: getting a program takes long enough to be told why."""
    print(f"backends: {text}", file=sys.stderr, flush=True)


def kafka(say: Say = announce) -> Path:
    """The folder with the jars of a Kafka server, and a Java that can run them."""
    return cache.made(f"kafka-{kafka_version()}", lambda partial: _get_kafka(partial, say), say)


def minio(say: Say = announce) -> Path:
    """The MinIO program."""
    name = f"minio-{MINIO_VERSION.removeprefix('v')}"
    return cache.made(name, lambda partial: _build_minio(partial, say), say) / "minio"


def kafka_version() -> str:
    """The version that pom.xml names."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text())
    assert found is not None
    return found[1]


def program(name: str, why: str, package: str) -> str:
    """Where the program of this name is."""
    if (path := shutil.which(name)) is None:
        raise UserError(f"{why} needs `{name}`, which is not on the PATH: install {package}", ExitCode.UNAVAILABLE)
    return path


def java() -> str:
    """The Java that runs Kafka."""
    return program(
        "java", "Kafka", f"a Java runtime, {OLDEST_JAVA} or later (Debian and Ubuntu: openjdk-17-jre-headless)"
    )


def _get_kafka(partial: Path, say: Say) -> None:
    _check_java()
    maven = program("mvn", "getting Kafka", "Maven (Debian and Ubuntu: maven)")
    say(f"getting Apache Kafka {kafka_version()} by Maven: about 44 MB, once")
    started = time.monotonic()
    _run(
        [maven, "-B", "-U", "-ntp", "-q", "-f", str(POM), COPY_JARS, "-Dstyle.color=never",
         "-DincludeScope=runtime", f"-DoutputDirectory={partial}"],
        "Maven could not get Kafka's jars", {}, lambda _lines, passed: say(f"  downloading, {passed:.0f} s"),
    )  # fmt: skip
    jars = len(list(partial.glob("*.jar")))
    say(f"Kafka is there: {jars} jars, {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _build_minio(partial: Path, say: Say) -> None:
    go = program("go", "building MinIO", f"Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or later")
    _check_go(go)
    nice = program("nice", "building MinIO", "coreutils")
    say("building MinIO by Go: about 1.2 GB of sources and up to 5 minutes on two cores, once")
    started = time.monotonic()

    def progress(lines: Sequence[str], passed: float) -> None:
        downloaded = sum("downloading" in line for line in lines)
        compiled = len(lines) - downloaded
        say(f"  {downloaded} modules downloaded, {compiled} packages compiled, {passed:.0f} s")

    _run(
        [nice, "-n", "10", go, "install", "-v", "-trimpath", "-ldflags", "-s -w", f"{MINIO_MODULE}@{MINIO_VERSION}"],
        "Go could not build MinIO", {"GOBIN": str(partial), "CGO_ENABLED": "0"}, progress,
    )  # fmt: skip
    say(f"MinIO is there: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _check_java() -> None:
    told = subprocess.run([java(), "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', told)
    if found is not None and int(found[1]) < OLDEST_JAVA:
        raise UserError(f"Kafka needs Java {OLDEST_JAVA} or later; `java` here is {found[1]}", ExitCode.UNAVAILABLE)


def _check_go(go: str) -> None:
    told = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)", told)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST_GO:
        raise UserError(
            f"MinIO needs Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or later; `go` here is {found[0]}", ExitCode.UNAVAILABLE
        )


def _run(command: Sequence[str], failure: str, settings: Mapping[str, str], progress: Progress) -> None:
    """Run it to its end and show progress meanwhile; it does not outlive us, so the next call finds nobody at work."""
    parent = os.getpid()
    started = shown = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **settings},
            preexec_fn=lambda: die_with_parent(parent),
        ) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=0.5)
                    if time.monotonic() - shown > SHOWN_EVERY_S:
                        shown = time.monotonic()
                        progress(_lines(output), shown - started)
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            told = "\n  ".join(_lines(output)[-LAST_LINES:])
            raise UserError(
                f"{failure}:\n  {told}\nmend that and call again: what is already downloaded is kept",
                ExitCode.UNAVAILABLE,
            )


def _lines(output: IO[str]) -> list[str]:
    """What was printed so far, without the codes for colors and without lines that say nothing."""
    output.seek(0)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.read())
    return [line for line in plain.splitlines() if line.removeprefix("[ERROR]").strip()]
