"""Renders the chart with Helm and checks the rules with promtool, which `tools.backends.downloads` gets into the cache.

A missing program is an error.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.backends import downloads

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "palimpsest"
PROMETHEUS = ROOT / "deploy" / "prometheus"
VALUES = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))
NAMESPACE = "training"
Document = dict[str, Any]
APIS = {
    "strimzi": ("kafka.strimzi.io/v1",),
    "keda": ("keda.sh/v1alpha1", "monitoring.coreos.com/v1"),
    "kueue": ("kueue.x-k8s.io/v1beta2", "jobset.x-k8s.io/v1alpha2"),
}
"""APIs of operators that the cluster has for a file of values."""


class Rendered:
    """The documents that Helm renders from one file of values."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def of(self, kind: str) -> dict[str, Document]:
        """Documents of a kind, by name."""
        return {one["metadata"]["name"]: one for one in self.documents if one["kind"] == kind}

    @property
    def jobs(self) -> dict[str, Document]:
        """Jobs by name, with those that a JobSet creates."""
        return self.of("Job") | {
            f"{name}-{one['name']}-0": one["template"]
            for name, jobs in self.of("JobSet").items()
            for one in jobs["spec"]["replicatedJobs"]
        }

    @property
    def pods(self) -> dict[str, Document]:
        """Pod templates by the name of their Job, Deployment or StatefulSet."""
        owners = self.jobs | self.of("Deployment") | self.of("StatefulSet")
        return {name: one["spec"]["template"] for name, one in owners.items()}

    def containers(self) -> Iterator[tuple[str, Document, Document]]:
        """Name, pod spec and container of every pod."""
        for name, pod in self.pods.items():
            for container in pod["spec"]["containers"]:
                yield name, pod["spec"], container

    @property
    def run_file(self) -> str:
        """Text of the run file in the ConfigMap."""
        (found,) = [one["data"]["run.toml"] for one in self.of("ConfigMap").values() if "run.toml" in one["data"]]
        return str(found)


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Helm in the folder of the chart."""
    path = downloads.helm()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False, cwd=CHART)

    return run


@pytest.fixture(scope="session")
def template(helm: Callable[..., Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Render a file of values, with further arguments, for a cluster that has the operators it needs."""

    def run(values: str, *arguments: str, release: str = "first") -> subprocess.CompletedProcess[str]:
        return helm(
            "template", release, ".", "-n", NAMESPACE, "-f", f"values/{values}.yaml",
            *(f"--api-versions={one}" for one in APIS.get(values, ())), *arguments,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def render(template: Callable[..., Any]) -> Callable[..., Rendered]:
    """Render a file of values and parse the documents. Each call with the same arguments renders once."""
    known: dict[Any, Rendered] = {}

    def run(values: str, *arguments: str, release: str = "first") -> Rendered:
        key = (values, *arguments, release)
        if key not in known:
            done = template(values, *arguments, release=release)
            assert done.returncode == 0, done.stderr
            known[key] = Rendered([one for one in yaml.safe_load_all(done.stdout) if one])
        return known[key]

    return run


@pytest.fixture(scope="session")
def promtool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run promtool in the folder of the Prometheus rules. A missing promtool is an error."""
    path = downloads.prometheus() / "promtool"

    def run(*arguments: str | Path, cwd: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=False, cwd=cwd)

    return run
