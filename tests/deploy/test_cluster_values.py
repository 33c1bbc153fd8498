"""Every file of values on a real API server: strict validation, installation, upgrade, test, uninstallation."""

from collections.abc import Callable, Iterator

import pytest

from tests.deploy import cluster as clusters
from tests.deploy.cluster import COMPONENT, CRDS, Cluster
from tests.deploy.conftest import VALUES, Document, Rendered
from tests.servers.kubernetes_client import Refused
from tools.backends import downloads

pytestmark = [pytest.mark.servers, pytest.mark.long]
Render = Callable[..., Rendered]
WAIT = ("--wait", "--timeout", "15m")
EXISTING = {"strimzi": (), "multi-node": ("model", "checkpoints")}
"""Claims that the values name. Others name `model`."""
SETTINGS = {
    "external": tuple(f"--set=monitoring.{part}.enabled=true" for part in ("podMonitor", "rules", "dashboards"))
}
OPERATORS = (
    "keda.sh_scaledobjects", "kueue.x-k8s.io_localqueues", "monitoring.coreos.com_podmonitors",
    "monitoring.coreos.com_prometheusrules",
)  # fmt: skip


def script(pod: Document) -> int | None:
    return 0 if pod["metadata"]["labels"].get(COMPONENT) == "test" else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the definitions of every operator, but without the operators."""
    with clusters.running(tmp_path_factory.mktemp("cluster"), script) as running:
        for path in [downloads.operator_crds() / f"{name}.yaml" for name in OPERATORS] + sorted(CRDS.glob("*.yaml")):
            running.define(path)
        running.nodes.add("spot", labels={"node-kind": "spot"})
        yield running


class Installed:
    """A release of one file of values in a namespace of its own."""

    def __init__(self, cluster: Cluster, values: str) -> None:
        self.cluster, self.values = cluster, values
        self.space = cluster.namespace(values, *EXISTING.get(values, ("model",)))
        self.before = cluster.names(self.space)
        self.helm("install", "first", ".")

    def helm(self, *command: str) -> None:
        given = ("-f", f"values/{self.values}.yaml", *SETTINGS.get(self.values, ()))
        self.cluster.done(*command, "-n", self.space, *given, *WAIT)

    def pods(self, component: str, number: int) -> set[str]:
        """Wait for this number of running pods; return their ids."""
        self.cluster.until(
            lambda: len(self.cluster.pods(self.space, component)) == number, f"{number} pods of {component}"
        )
        return {one["metadata"]["uid"] for one in self.cluster.pods(self.space, component)}

    def all_pods(self) -> set[str]:
        found = (self.cluster.pods(self.space, part) for part in ("learner", "rollout", "replica", "gateway", "store"))
        return {one["metadata"]["uid"] for pods in found for one in pods}


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Callable[[str], Installed]:
    known: dict[str, Installed] = {}

    def find(values: str) -> Installed:
        if values not in known:
            known[values] = Installed(cluster, values)
        return known[values]

    return find


@pytest.mark.parametrize("values", VALUES)
def test_the_server_accepts_every_document_without_an_unknown_field(
    values: str, cluster: Cluster, render: Render
) -> None:
    rendered = render(values, "--api-versions=monitoring.coreos.com/v1", *SETTINGS.get(values, ()))
    for document in rendered.documents:
        cluster.kubernetes.create(document, "default", dry=True)
    for name, job in rendered.jobs.items():  # those of a JobSet, whose definition does not check them
        whole = {"apiVersion": "batch/v1", "kind": "Job", **job}
        whole["metadata"] = {**job["metadata"], "name": name}
        cluster.kubernetes.create(whole, "default", dry=True)


@pytest.mark.parametrize("values", [one for one in VALUES if one != "kueue"])
def test_an_installed_release_runs_and_an_upgrade_changes_no_pod(
    values: str, installed: Callable[[str], Installed], render: Render
) -> None:
    release, rendered = installed(values), render(values, "--api-versions=monitoring.coreos.com/v1")
    for component in ("learner", "rollout", "replica"):
        jobs = [one["spec"] for name, one in rendered.jobs.items() if f"-{component}" in name]
        if jobs:
            release.pods(component, sum(one["parallelism"] for one in jobs))
    before = release.all_pods()
    release.helm("upgrade", "first", ".")
    assert release.all_pods() == before


def test_an_upgrade_leaves_the_number_of_autoscaled_workers(installed: Callable[[str], Installed]) -> None:
    """The test scales as KEDA's autoscaler does."""
    release = installed("keda")
    scale = {"spec": {"replicas": 3}}
    release.cluster.kubernetes.patch(
        "apps/v1", "StatefulSet", "first-palimpsest-rollout", scale, release.space, "scale"
    )
    before = release.pods("rollout", 3)
    release.helm("upgrade", "first", ".")
    assert release.pods("rollout", 3) == before
    names = [
        one["metadata"]["labels"]["apps.kubernetes.io/pod-index"] for one in release.cluster.pods("keda", "rollout")
    ]
    assert sorted(names) == ["0", "1", "2"]


def test_queued_jobs_wait_for_kueue_and_an_upgrade_does_not_suspend_them_again(
    installed: Callable[[str], Installed], render: Render
) -> None:
    """The test starts the Jobs as Kueue and JobSet do: it creates the JobSet's Jobs and ends the suspension."""
    release = installed("kueue")
    kubernetes = release.cluster.kubernetes
    for name, job in render("kueue").jobs.items():
        if "-learner-" in name:
            whole = {"apiVersion": "batch/v1", "kind": "Job", **job, "metadata": {**job["metadata"], "name": name}}
            kubernetes.create(whole, release.space)
    assert release.pods("rollout", 0) == set()
    jobs = {one["metadata"]["name"]: one for one in kubernetes.list("batch/v1", "Job", release.space)}
    assert jobs["first-palimpsest-rollout"]["spec"]["suspend"] is True
    go = {"spec": {"suspend": False}}
    kubernetes.patch("batch/v1", "Job", "first-palimpsest-rollout", go, release.space)
    kubernetes.patch("jobset.x-k8s.io/v1alpha2", "JobSet", "first-palimpsest-learner", go, release.space)
    before = release.pods("rollout", 8) | release.pods("learner", 2)
    release.helm("upgrade", "first", ".")
    assert release.pods("rollout", 8) | release.pods("learner", 2) == before


def test_a_budget_keeps_the_workers_that_the_values_ask_for(installed: Callable[[str], Installed]) -> None:
    """external.yaml: two of four stay."""
    release = installed("external")
    release.pods("rollout", 4)
    names = [one["metadata"]["name"] for one in release.cluster.pods(release.space, "rollout")]
    kubernetes = release.cluster.kubernetes
    budget = ("policy/v1", "PodDisruptionBudget", "first-palimpsest-rollout", release.space)
    release.cluster.until(lambda: (kubernetes.get(*budget) or {})["status"]["disruptionsAllowed"] == 2, "the budget")
    release.cluster.nodes.pause()
    try:
        for name in names[:2]:
            kubernetes.evict(name, release.space)
        with pytest.raises(Refused, match="disruption budget"):
            kubernetes.evict(names[2], release.space)
    finally:
        release.cluster.nodes.resume()
    release.pods("rollout", 4)


@pytest.mark.parametrize("values", ["external", "keda"])
def test_a_tested_and_uninstalled_release_leaves_only_its_claims(
    values: str, installed: Callable[[str], Installed]
) -> None:
    release = installed(values)
    release.cluster.done("test", "first", "-n", release.space, "--timeout", "15m")
    release.cluster.done("uninstall", "first", "-n", release.space, *WAIT)
    kept = {"PersistentVolumeClaim/first-palimpsest-learner"}
    names = release.cluster.kubernetes.names
    release.cluster.until(lambda: names(release.space) == release.before | kept, f"only {kept} is left")
