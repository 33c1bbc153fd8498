"""Downloads Kafka with Maven and Prometheus with apt, and builds MinIO and Helm with Go, once into the cache."""

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
"""Called every few seconds with the output of the program so far and the elapsed seconds."""
POM = Path(__file__).parent / "pom.xml"
MINIO_MODULE = "github.com/minio/minio"
MINIO_VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
"""Newest version on the Go module proxy, of 2026-02-12."""
HELM_MODULE = "helm.sh/helm/v3"
HELM_VERSION = "v3.22.0"
KUBERNETES = (1, 36)
"""Version of Kubernetes for which Helm renders without a cluster. A Helm that Go builds would take 1.20."""
PROMETHEUS_VERSION = "2.42.0"
"""Version of Debian 12. apt takes the newest revision of it."""
COPY_JARS = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
"""The full name. With the short name, Maven reports a failed connection as a missing plugin."""
OLDEST_JAVA, OLDEST_GO = 17, (1, 21)
"""MinIO and Helm need a newer Go. Go 1.21 and later download it."""
SHOWN_EVERY_S = 10.0
LAST_LINES = 12


def announce(text: str) -> None:
    """Print the text on standard error."""
    print(f"backends: {text}", file=sys.stderr, flush=True)


def kafka(say: Say = announce) -> Path:
    """Return the folder with the jars of a Kafka server. Raises UserError."""
    return cache.made(f"kafka-{kafka_version()}", lambda partial: _get_kafka(partial, say), say)


def minio(say: Say = announce) -> Path:
    """Return the path of the MinIO program. Raises UserError."""
    name = f"minio-{MINIO_VERSION.removeprefix('v')}"
    return cache.made(name, lambda partial: _build_minio(partial, say), say) / "minio"


def helm(say: Say = announce) -> Path:
    """Return the path of the Helm program. Raises UserError."""
    name = f"helm-{HELM_VERSION.removeprefix('v')}"
    return cache.made(name, lambda partial: _build_helm(partial, say), say) / "helm"


def prometheus(say: Say = announce) -> Path:
    """Return the folder with the programs `prometheus` and `promtool`. Raises UserError."""
    name = f"prometheus-{PROMETHEUS_VERSION}"
    return cache.made(name, lambda partial: _get_prometheus(partial, say), say)


def kafka_version() -> str:
    """Return the version of Kafka in pom.xml."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text())
    assert found is not None
    return found[1]


def program(name: str, why: str, package: str) -> str:
    """Return the path of a program. Raises UserError if it is not on the PATH."""
    if (path := shutil.which(name)) is None:
        raise UserError(f"{why} needs `{name}`, which is not on the PATH: install {package}", ExitCode.UNAVAILABLE)
    return path


def java() -> str:
    """Return the path of Java. Raises UserError if it is missing."""
    return program(
        "java", "Kafka", f"a Java runtime, {OLDEST_JAVA} or later (Debian and Ubuntu: openjdk-17-jre-headless)"
    )


def _get_kafka(partial: Path, say: Say) -> None:
    _check_java()
    maven = program("mvn", "downloading Kafka", "Maven (Debian and Ubuntu: maven)")
    say(f"downloading Apache Kafka {kafka_version()} with Maven: about 44 MB, once")
    started = time.monotonic()
    run(
        [maven, "-B", "-U", "-ntp", "-q", "-f", str(POM), COPY_JARS, "-Dstyle.color=never",
         "-DincludeScope=runtime", f"-DoutputDirectory={partial}"],
        "Maven could not download the jars of Kafka", {}, lambda _lines, passed: say(f"  downloading, {passed:.0f} s"),
    )  # fmt: skip
    jars = len(list(partial.glob("*.jar")))
    say(f"Kafka is ready: {jars} jars, {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _build_minio(partial: Path, say: Say) -> None:
    say("building MinIO with Go: about 1.2 GB of sources and up to 5 minutes on two cores, once")
    _go_install(partial, "MinIO", f"{MINIO_MODULE}@{MINIO_VERSION}", "-s -w", say)


def _build_helm(partial: Path, say: Say) -> None:
    say("building Helm with Go: about four minutes of processor time, once")
    stamps = {
        f"{HELM_MODULE}/internal/version.version": HELM_VERSION,
        **{
            f"{HELM_MODULE}/pkg/{package}.k8sVersion{part}": str(number)
            for package in ("chartutil", "lint/rules")
            for part, number in zip(("Major", "Minor"), KUBERNETES, strict=True)
        },
    }
    flags = " ".join(["-s -w", *(f"-X {name}={value}" for name, value in stamps.items())])
    _go_install(partial, "Helm", f"{HELM_MODULE}/cmd/helm@{HELM_VERSION}", flags, say)


def _get_prometheus(partial: Path, say: Say) -> None:
    apt = program("apt-get", "downloading Prometheus", "apt (Debian)")
    dpkg = program("dpkg-deb", "unpacking Prometheus", "dpkg (Debian)")
    say(f"downloading Prometheus {PROMETHEUS_VERSION} with apt: about 19 MB, once")
    started = time.monotonic()
    run(
        [apt, "download", f"prometheus={PROMETHEUS_VERSION}*"],
        f"apt could not download Prometheus {PROMETHEUS_VERSION} (run `apt-get update` first; on another system than "
        f"Debian 12, put the programs prometheus and promtool into {partial.with_suffix('')})",
        {}, lambda _lines, passed: say(f"  downloading, {passed:.0f} s"), folder=partial,
    )  # fmt: skip
    for package in partial.glob("*.deb"):
        run([dpkg, "-x", str(package), str(partial)], "dpkg could not unpack Prometheus", {}, lambda *_: None)
        package.unlink()
    for name in ("prometheus", "promtool"):
        (partial / "usr/bin" / name).rename(partial / name)
    for folder in ("etc", "lib", "usr", "var"):
        shutil.rmtree(partial / folder, ignore_errors=True)
    say(f"Prometheus is ready: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _go_install(partial: Path, what: str, module: str, linker_flags: str, say: Say) -> None:
    """Build a program from the Go module proxy into the folder."""
    go = program("go", f"building {what}", f"Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or later")
    _check_go(go, what)
    nice = program("nice", f"building {what}", "coreutils")
    started = time.monotonic()

    def progress(lines: Sequence[str], passed: float) -> None:
        downloaded = sum("downloading" in line for line in lines)
        compiled = len(lines) - downloaded
        say(f"  {downloaded} modules downloaded, {compiled} packages compiled, {passed:.0f} s")

    run(
        [nice, "-n", "10", go, "install", "-v", "-trimpath", "-ldflags", linker_flags, module],
        f"Go could not build {what}", {"GOBIN": str(partial), "CGO_ENABLED": "0"}, progress,
    )  # fmt: skip
    say(f"{what} is ready: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _check_java() -> None:
    output = subprocess.run([java(), "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', output)
    if found is not None and int(found[1]) < OLDEST_JAVA:
        raise UserError(f"Kafka needs Java {OLDEST_JAVA} or later; `java` here is {found[1]}", ExitCode.UNAVAILABLE)


def _check_go(go: str, what: str) -> None:
    output = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)", output)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST_GO:
        raise UserError(
            f"{what} needs Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or later; `go` here is {found[0]}", ExitCode.UNAVAILABLE
        )


def run(
    command: Sequence[str],
    failure: str,
    settings: Mapping[str, str],
    progress: Progress,
    *,
    folder: Path | None = None,
) -> None:
    """Run a command and show its progress. The command ends with this process. Raises UserError if it fails."""
    parent = os.getpid()
    started = shown = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **settings},
            cwd=folder,
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
            tail = "\n  ".join(_lines(output)[-LAST_LINES:])
            raise UserError(
                f"{failure}:\n  {tail}\nfix this and repeat the command; finished downloads are kept",
                ExitCode.UNAVAILABLE,
            )


def _lines(output: IO[str]) -> list[str]:
    """Return the lines of the output so far, without color codes and empty lines."""
    output.seek(0)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.read())
    return [line for line in plain.splitlines() if line.removeprefix("[ERROR]").strip()]
