"""A cluster for tests of the chart: a real control plane, nodes without machines, and Helm."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.deploy.conftest import CHART, Document
from tests.processes import waiting
from tests.servers import control_plane
from tests.servers.fake_nodes import FakeNodes, Script
from tests.servers.kubernetes_client import Kubernetes, condition
from tools.backends import downloads

CRDS = Path(__file__).parent / "crds"
"""Minimal definitions of our own, of the kinds and fields that the chart uses."""
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
COMPONENT = "app.kubernetes.io/component"


class Cluster:
    """A running cluster. `kubernetes` is for the test's thread."""

    def __init__(self, plane: control_plane.ControlPlane, nodes: FakeNodes) -> None:
        self.kubernetes, self.nodes = Kubernetes(plane.client()), nodes
        self._environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig())}

    def helm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Helm in the folder of the chart."""
        command = [str(downloads.helm()), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=CHART, env=self._environment
        )  # fmt: skip

    def done(self, *arguments: str) -> str:
        """Run Helm, which must succeed. Return its output."""
        done = self.helm(*arguments)
        self.nodes.check()
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def namespace(self, name: str, *claims: str, volumes: int = 3) -> str:
        """Create a namespace that admits only restricted pods, with these claims and as many further volumes."""
        self.kubernetes.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}
        )
        modes = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]
        for number in range(volumes + len(claims)):
            spec = {"capacity": {"storage": "1Ti"}, "accessModes": modes, "hostPath": {"path": "/none"}}
            volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{name}-{number}"}}
            self.kubernetes.create({**volume, "spec": spec})
        for claim in claims:
            spec = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}}
            document = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": spec}
            self.kubernetes.create(document, name)
        return name

    def names(self, namespace: str) -> set[str]:
        """Return `kind/name` of everything in a namespace, once it has what Kubernetes puts into each."""
        given = {"ConfigMap/kube-root-ca.crt", "ServiceAccount/default"}
        self.until(lambda: given <= self.kubernetes.names(namespace), f"the defaults of the namespace {namespace}")
        return self.kubernetes.names(namespace)

    def define(self, path: Path) -> None:
        """Create the CustomResourceDefinitions in a file and wait until the server has them."""
        for document in yaml.safe_load_all(path.read_text()):
            self.kubernetes.create(document)
            self.until(lambda name=document["metadata"]["name"]: self._defined(name), f"the definition in {path.name}")

    def pods(self, namespace: str, component: str) -> list[Document]:
        """Pods of a component that run and are not about to be removed, by name."""
        found = self.kubernetes.list("v1", "Pod", namespace, f"{COMPONENT}={component}")
        running = [one for one in found if one["status"]["phase"] == "Running" and not deleted(one)]
        return sorted(running, key=lambda one: str(one["metadata"]["name"]))

    def pod(self, namespace: str, component: str) -> Document:
        """Wait until one pod of a component runs, and return it."""
        self.until(lambda: len(self.pods(namespace, component)) == 1, f"one pod of {component} in {namespace}")
        (pod,) = self.pods(namespace, component)
        return pod

    def until(self, holds: object, name: str) -> None:
        """Wait until holds() is true, or the nodes fail."""

        def look() -> bool:
            self.nodes.check()
            return bool(holds())  # type: ignore[operator]

        waiting.until(look, name)

    def _defined(self, name: str) -> bool:
        found = self.kubernetes.get("apiextensions.k8s.io/v1", "CustomResourceDefinition", name)
        return bool(condition(found, "Established"))


def deleted(document: Document) -> bool:
    """Whether an object waits for its removal."""
    return "deletionTimestamp" in document["metadata"]


@contextmanager
def running(folder: Path, script: Script) -> Iterator[Cluster]:
    """Start a cluster with the nodes `node-0` and `node-1`."""
    downloads.helm()
    with control_plane.running(folder) as plane:
        waiting.until(lambda: _has_defaults(plane), "the namespaces of the API server")
        with FakeNodes(lambda: Kubernetes(plane.client()), script) as nodes:
            for number in range(2):
                nodes.add(f"node-{number}")
            yield Cluster(plane, nodes)


def _has_defaults(plane: control_plane.ControlPlane) -> bool:
    return Kubernetes(plane.client()).get("v1", "Namespace", "default") is not None
