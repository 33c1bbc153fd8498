"""Every file of values on a real API server: installed, upgraded, rolled back, drained, moved, tested, uninstalled."""

from collections.abc import Callable, Iterator

import pytest

from tests.deploy import cluster as clusters
from tests.deploy.cluster import COMPONENT, CRDS, Cluster
from tests.deploy.conftest import VALUES, Document, Rendered
from tests.deploy.releases import JOBSET, SETTINGS, WAIT, WORKERS, Release
from tests.servers.kubernetes_client import Refused
from tools.backends import downloads

pytestmark = [pytest.mark.servers, pytest.mark.long]
Render = Callable[..., Rendered]
Installed = Callable[[str], Release]
MONITORED = "--api-versions=monitoring.coreos.com/v1"
OPERATORS = (
    "keda.sh_scaledobjects", "kueue.x-k8s.io_localqueues", "monitoring.coreos.com_podmonitors",
    "monitoring.coreos.com_prometheusrules",
)  # fmt: skip
OLD = {"node-0": {}, "node-1": {}, "spot": {"node-kind": "spot"}}
NEW = {"node-2": {}, "node-3": {}, "spot-1": {"node-kind": "spot"}}
"""Nodes with their labels: those of the start, and those that replace them."""


def script(pod: Document) -> int | None:
    return 0 if pod["metadata"]["labels"].get(COMPONENT) == "test" else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the definitions of every operator, but without the operators."""
    with clusters.running(tmp_path_factory.mktemp("cluster"), script) as running:
        for path in [downloads.operator_crds() / f"{name}.yaml" for name in OPERATORS] + sorted(CRDS.glob("*.yaml")):
            running.define(path)
        running.nodes.add("spot", labels=OLD["spot"])
        yield running


@pytest.fixture(scope="module")
def installed(cluster: Cluster, render: Render) -> Installed:
    """Install a file of values once. Its pods may be suspended."""
    known: dict[str, Release] = {}

    def find(values: str) -> Release:
        if values not in known:
            known[values] = Release(cluster, values, render(values, MONITORED, *SETTINGS.get(values, ())))
        return known[values]

    return find


@pytest.mark.parametrize("values", VALUES)
def test_the_server_accepts_every_document_without_an_unknown_field(
    values: str, cluster: Cluster, render: Render
) -> None:
    rendered = render(values, MONITORED, *SETTINGS.get(values, ()))
    for document in rendered.documents:
        cluster.kubernetes.create(document, "default", dry=True)
    for name, job in rendered.jobs.items():  # those of a JobSet, whose definition does not check them
        whole = {"apiVersion": "batch/v1", "kind": "Job", **job}
        whole["metadata"] = {**job["metadata"], "name": name}
        cluster.kubernetes.create(whole, "default", dry=True)


def test_queued_jobs_wait_for_kueue(installed: Installed) -> None:
    """The gateway and the store, which need no GPU, start at once."""
    release = installed("kueue")
    kubernetes = release.cluster.kubernetes
    assert {one["metadata"]["name"]: one["spec"]["suspend"] for one in release.jobs()} == {WORKERS: True}
    assert (kubernetes.get(*JOBSET, release.space) or {})["spec"]["suspend"] is True
    assert {part: len(release.pods(part)) for part in release.numbers()} == {
        "gateway": 1, "learner": 0, "rollout": 0, "store": 1,
    }  # fmt: skip
    release.begin()


@pytest.mark.parametrize("values", VALUES)
def test_an_installed_release_runs_and_an_upgrade_changes_no_pod(values: str, installed: Installed) -> None:
    """In a queue too: the upgrade does not suspend what Kueue has started."""
    release = installed(values).begin()
    before = release.ids()
    release.helm("upgrade", "first", ".")
    assert release.ids() == before


def test_an_upgrade_leaves_the_number_of_autoscaled_workers(installed: Installed) -> None:
    release = installed("keda").begin()
    release.scale(3)
    before = release.wait("rollout", 3)
    release.helm("upgrade", "first", ".")
    assert release.wait("rollout", 3) == before
    names = [one["metadata"]["labels"]["apps.kubernetes.io/pod-index"] for one in release.pods("rollout")]
    assert sorted(names) == ["0", "1", "2"]


@pytest.mark.parametrize("values", VALUES)
def test_a_rollback_undoes_an_upgrade_and_changes_no_other_pod(values: str, installed: Installed) -> None:
    """In a queue it suspends the Jobs, as docs/kubernetes.md states, and Kueue starts them again."""
    release = installed(values).begin()
    gateways = release.numbers()["gateway"]
    others = release.ids(*set(release.numbers()) - {"gateway", "rollout" if values == "kueue" else ""})
    release.helm("upgrade", "first", ".", "--set", f"gateway.count={gateways + 1}")
    release.wait("gateway", gateways + 1)
    release.cluster.done("rollback", "first", "1", "-n", release.space, *WAIT)
    release.wait("gateway", gateways)
    if values == "kueue":
        live = release.cluster.kubernetes.get(*JOBSET, release.space) or {}
        assert live["spec"]["suspend"] is True
        release.wait("rollout", 0)
        release.resume()
    assert others <= release.ids()


@pytest.mark.parametrize("values", VALUES)
def test_evicted_pods_are_replaced_and_do_not_count_as_failed(values: str, installed: Installed) -> None:
    """One pod of each component, as the drain of a node does it."""
    release = installed(values).begin()
    failed, numbers = release.failed(), release.numbers()
    numbers.pop("minio", None)  # for development; no budget protects it
    for component, number in numbers.items():
        before = release.wait(component, number)
        victim = release.pods(component)[0]["metadata"]
        release.evict(victim["name"])
        release.cluster.until(
            lambda part=component, old=victim["uid"]: old not in release.ids(part), f"the end of {victim['name']}"
        )
        assert len(release.wait(component, number) & before) == number - 1
    assert release.failed() == failed


def test_a_budget_keeps_the_workers_that_the_values_ask_for(installed: Installed) -> None:
    """external.yaml: two of four stay."""
    release = installed("external").begin()
    names = [one["metadata"]["name"] for one in release.pods("rollout")]
    kubernetes = release.cluster.kubernetes
    budget = ("policy/v1", "PodDisruptionBudget", WORKERS, release.space)
    release.cluster.until(lambda: (kubernetes.get(*budget) or {})["status"]["disruptionsAllowed"] == 2, "the budget")
    release.cluster.nodes.pause()
    try:
        for name in names[:2]:
            kubernetes.evict(name, release.space)
        with pytest.raises(Refused, match="disruption budget"):
            kubernetes.evict(names[2], release.space)
    finally:
        release.cluster.nodes.resume()
    release.wait("rollout", 4)


def test_the_pods_of_lost_nodes_start_on_others(installed: Installed, cluster: Cluster) -> None:
    """All nodes at once, because Kubernetes takes a minute to act on a loss. No Job counts a failure."""
    releases = [installed(values).begin() for values in VALUES]
    failed, before = [one.failed() for one in releases], [one.ids() for one in releases]
    for name, labels in NEW.items():
        cluster.nodes.add(name, labels=labels)
    for name in OLD:
        cluster.kubernetes.delete("v1", "Node", name)
    for release, old, counted in zip(releases, before, failed, strict=True):
        for component, number in release.numbers().items():
            cluster.until(
                lambda part=component, wanted=number, one=release: (
                    [pod["spec"]["nodeName"] in NEW for pod in one.pods(part)] == [True] * wanted
                ),
                f"{number} pods of {component} on other nodes, in {release.space}",
            )
        assert not release.ids() & old
        assert release.failed() == counted


@pytest.mark.parametrize("values", VALUES)
def test_a_tested_and_uninstalled_release_leaves_only_its_claims(values: str, installed: Installed) -> None:
    release = installed(values).begin()
    tested = release.cluster.done("test", "first", "-n", release.space, "--timeout", "15m")
    assert "Phase:          Succeeded" in tested
    release.cluster.done("uninstall", "first", "-n", release.space, *WAIT)
    names = release.cluster.kubernetes.names
    left = release.before | release.kept()
    release.cluster.until(lambda: names(release.space) == left, f"only {release.kept()} is left in {release.space}")
