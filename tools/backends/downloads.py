"""Downloads and builds the programs of tests and of local servers, each once into the cache.

Maven downloads Kafka; apt Prometheus, etcd and bubblewrap; Go builds MinIO, Helm, Kubernetes and test programs.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache, go
from tools.backends.cache import Say
from tools.backends.commands import program, run

POM = Path(__file__).parent / "pom.xml"
MINIO_MODULE = "github.com/minio/minio"
MINIO_VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
"""Newest version on the Go module proxy, of 2026-02-12."""
HELM_MODULE = "helm.sh/helm/v3"
HELM_VERSION = "v3.22.0"
KUBERNETES = (1, 36)
"""Version of Kubernetes for which Helm renders without a cluster. A Helm that Go builds would take 1.20."""
KUBERNETES_VERSION = "1.36.3"
"""Version in go_modules/kubernetes/go.mod."""
HELM_UNITTEST_VERSION = "1.1.2"
"""Version in go_modules/helm_unittest/go.mod."""
GRAFANA_SCHEMA_VERSION = "0.0.22"
"""Version of grafana-foundation-sdk in go_modules/grafana/go.mod."""
ETCD_VERSION, PROMETHEUS_VERSION, BUBBLEWRAP_VERSION = "3.4.23", "2.42.0", "0.8.0"
"""Versions of Debian 12. apt takes the newest revision."""
OPERATOR_CRDS = {
    "github.com/kedacore/keda/v2@v2.21.0": "config/crd/bases/keda.sh_*.yaml",
    "sigs.k8s.io/kueue@v0.17.0": "config/components/crd/bases/*.yaml",
    "github.com/prometheus-operator/prometheus-operator@v0.85.0":
        "example/prometheus-operator-crd/*.yaml",
}  # fmt: skip
"""Modules that ship their definitions. Strimzi and JobSet are not on the Go module proxy."""
GO_MODULES = Path(__file__).parent / "go_modules"
COPY_JARS = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
"""The full name. With the short name, Maven reports a failed connection as a missing plugin."""
OLDEST_JAVA = 17


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
    wanted = ("prometheus", PROMETHEUS_VERSION, ("prometheus", "promtool"))
    return cache.made(f"prometheus-{PROMETHEUS_VERSION}", lambda partial: _get_debian(partial, *wanted, say), say)


def etcd(say: Say = announce) -> Path:
    """Return the path of the etcd program. Raises UserError."""
    wanted = ("etcd-server", ETCD_VERSION, ("etcd",))
    return cache.made(f"etcd-{ETCD_VERSION}", lambda partial: _get_debian(partial, *wanted, say), say) / "etcd"


def bubblewrap(say: Say = announce) -> Path:
    """Return the path of the program bwrap. Raises UserError."""
    wanted = ("bubblewrap", BUBBLEWRAP_VERSION, ("bwrap",))
    return cache.made(f"bubblewrap-{BUBBLEWRAP_VERSION}", lambda partial: _get_debian(partial, *wanted, say), say) / (
        "bwrap"
    )


def kubernetes(say: Say = announce) -> Path:
    """Return the path of the servers of Kubernetes, one program (go_modules/kubernetes/main.go). Raises UserError."""
    return cache.made(f"kubernetes-{KUBERNETES_VERSION}", lambda partial: _build_kubernetes(partial, say), say) / (
        "kubernetes"
    )


def helm_unittest(say: Say = announce) -> Path:
    """Return the path of helm-unittest. Raises UserError."""
    name = f"helm-unittest-{HELM_UNITTEST_VERSION}"
    return cache.made(name, lambda partial: _build_helm_unittest(partial, say), say) / "helm-unittest"


def dashboard_reader(say: Say = announce) -> Path:
    """Return the path of a program that reads dashboards by Grafana's schema (go_modules/grafana). Raises UserError."""
    name = f"dashboard-reader-{GRAFANA_SCHEMA_VERSION}"
    return cache.made(name, lambda partial: _build_dashboard_reader(partial, say), say) / "grafana"


def operator_crds(say: Say = announce) -> Path:
    """Return the folder with the CustomResourceDefinitions that the Go modules of operators have. Raises UserError."""
    versions = "-".join(module.rpartition("@v")[2] for module in OPERATOR_CRDS)
    return cache.made(f"operator-crds-{versions}", _copy_crds, say)


def kafka_version() -> str:
    """Return the version of Kafka in pom.xml."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text())
    assert found is not None
    return found[1]


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
    go.install(partial, "MinIO", f"{MINIO_MODULE}@{MINIO_VERSION}", "-s -w", say)


def _build_kubernetes(partial: Path, say: Say) -> None:
    say("building an API server with Go: about 0.7 GB of sources and ten minutes of processor time, once")
    stamp = "k8s.io/component-base/version.git"
    numbers = KUBERNETES_VERSION.split(".")
    stamps = {"Version": f"v{KUBERNETES_VERSION}", "Major": numbers[0], "Minor": numbers[1]}
    flags = " ".join(["-s -w", *(f"-X {stamp}{name}={value}" for name, value in stamps.items())])
    go.build(partial, "Kubernetes", GO_MODULES / "kubernetes", ".", flags, say)


def _build_helm_unittest(partial: Path, say: Say) -> None:
    say("building helm-unittest with Go, once")
    package = "github.com/helm-unittest/helm-unittest/cmd/helm-unittest"
    stamp = "helm.sh/helm/v3/pkg/chartutil.k8sVersion"
    flags = " ".join(["-s -w", f"-X {stamp}Major={KUBERNETES[0]}", f"-X {stamp}Minor={KUBERNETES[1]}"])
    go.build(partial, "helm-unittest", GO_MODULES / "helm_unittest", package, flags, say)


def _build_dashboard_reader(partial: Path, say: Say) -> None:
    say("building a reader of dashboards with Go: about half a minute of processor time, once")
    go.build(partial, "the reader of dashboards", GO_MODULES / "grafana", ".", "-s -w", say)


def _copy_crds(partial: Path) -> None:
    for module, pattern in OPERATOR_CRDS.items():
        for path in go.module_folder("tests of the chart", module).glob(pattern):
            (partial / path.name).write_bytes(path.read_bytes())


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
    go.install(partial, "Helm", f"{HELM_MODULE}/cmd/helm@{HELM_VERSION}", flags, say)


def _get_debian(partial: Path, package: str, version: str, programs: Sequence[str], say: Say) -> None:
    """Fill the folder with programs of a Debian package, which is not installed."""
    why = package.capitalize()
    apt = program("apt-get", f"downloading {why}", "apt (Debian)")
    dpkg = program("dpkg-deb", f"unpacking {why}", "dpkg (Debian)")
    wanted = f"program{'s' if len(programs) > 1 else ''} {' and '.join(programs)}"
    say(f"downloading {why} {version} with apt, once")
    started = time.monotonic()
    run(
        [apt, "download", f"{package}={version}*"],
        f"apt could not download {why} {version} (run `apt-get update` first; on another system than "
        f"Debian 12, put the {wanted} into {partial.with_suffix('')})",
        {}, lambda _lines, passed: say(f"  downloading, {passed:.0f} s"), folder=partial,
    )  # fmt: skip
    for archive in partial.glob("*.deb"):
        run([dpkg, "-x", str(archive), str(partial)], f"dpkg could not unpack {why}", {}, lambda *_: None)
        archive.unlink()
    for name in programs:
        (partial / "usr/bin" / name).rename(partial / name)
    for folder in ("etc", "lib", "usr", "var"):
        shutil.rmtree(partial / folder, ignore_errors=True)
    say(f"{why} is ready: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _check_java() -> None:
    output = subprocess.run([java(), "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', output)
    if found is not None and int(found[1]) < OLDEST_JAVA:
        raise UserError(f"Kafka needs Java {OLDEST_JAVA} or later; `java` here is {found[1]}", ExitCode.UNAVAILABLE)
