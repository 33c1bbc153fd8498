"""The chart's minimal values on a real API server: Helm's commands, lost pods and nodes, and what is left."""

from collections.abc import Callable, Iterator

import pytest

from palimpsest.common.user_error import ExitCode
from tests.deploy import cluster as clusters
from tests.deploy.cluster import COMPONENT, Cluster
from tests.deploy.conftest import Document, Rendered
from tests.servers.kubernetes_client import Refused, condition

pytestmark = pytest.mark.servers
SPACE, LOST, CODES = "training", "lost", "codes"
MINIMAL = ("-f", "values/minimal.yaml")
WAIT = ("--wait", "--timeout", "15m")
CLAIM = "v1", "PersistentVolumeClaim"
FINAL = (ExitCode.CONFIGURATION, ExitCode.DAMAGED, ExitCode.CANARY, ExitCode.REPLACED, ExitCode.STOPPED)
COUNTED, IGNORED = (1, ExitCode.UNAVAILABLE), ExitCode.INTERRUPTED
test_code = {"": 0}
"""Exit code of the pod of `helm test`."""


def script(pod: Document) -> int | None:
    return test_code[""] if pod["metadata"]["labels"].get(COMPONENT) == "test" else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster. The node with a worker is lost at the start, because Kubernetes takes a minute to act on that."""
    with clusters.running(tmp_path_factory.mktemp("cluster"), script) as running:
        running.nodes.add("spot-0", labels={"kind": "spot"})
        running.namespace(LOST, "model")
        running.done("install", "first", ".", "-n", LOST, *MINIMAL, "--set", "rollout.nodeSelector.kind=spot", *WAIT)
        running.pod(LOST, "rollout")
        running.nodes.add("spot-1", labels={"kind": "spot"})
        running.kubernetes.delete("v1", "Node", "spot-0")
        yield running


@pytest.fixture(scope="module")
def release(cluster: Cluster) -> Cluster:
    """The release `first` in the namespace `training`, with two gateways."""
    cluster.namespace(SPACE, "model")
    cluster.done("install", "first", ".", "-n", SPACE, *MINIMAL, "--set", "gateway.count=2", *WAIT)
    for component in ("learner", "rollout", "store", "minio"):
        cluster.pod(SPACE, component)
    return cluster


def job(cluster: Cluster, name: str, namespace: str = SPACE) -> Document:
    found = cluster.kubernetes.get("batch/v1", "Job", f"first-palimpsest-{name}", namespace)
    assert found is not None
    return found


def test_the_server_accepts_every_document_without_an_unknown_field(
    cluster: Cluster, render: Callable[..., Rendered]
) -> None:
    """Strict validation: without it the server drops unknown fields."""
    for document in render("minimal").documents:
        cluster.kubernetes.create(document, "default", dry=True)
    (service,) = [one for one in render("minimal").documents if one["metadata"]["name"] == "first-palimpsest-store"][:1]
    with pytest.raises(Refused, match=r'unknown field "spec\.prots"'):
        cluster.kubernetes.create({**service, "spec": {**service["spec"], "prots": []}}, "default", dry=True)


def test_an_installed_release_runs(release: Cluster) -> None:
    """With restricted pod security, which the namespace enforces."""
    assert len(release.pods(SPACE, "gateway")) == 2
    worker = release.pod(SPACE, "rollout")
    assert worker["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == "0"
    learner = release.pod(SPACE, "learner")
    assert f"{learner['spec']['hostname']}.{learner['spec']['subdomain']}" == (
        "first-palimpsest-learner-0-0.first-palimpsest-learner"
    )


def test_helm_test_reports_the_result_of_its_job(release: Cluster) -> None:
    assert "Phase:          Succeeded" in release.done("test", "first", "-n", SPACE, "--timeout", "15m")
    assert release.kubernetes.get("batch/v1", "Job", "first-palimpsest-test", SPACE) is None
    test_code[""] = 1
    try:
        failed = release.helm("test", "first", "-n", SPACE, "--timeout", "15m")
    finally:
        test_code[""] = 0
    assert failed.returncode != 0
    assert "first-palimpsest-test" in failed.stderr


def test_an_upgrade_and_a_rollback_change_only_what_was_asked(release: Cluster) -> None:
    before = {one["metadata"]["uid"] for part in ("learner", "rollout", "store") for one in release.pods(SPACE, part)}
    release.done("upgrade", "first", ".", "-n", SPACE, *MINIMAL, "--set", "gateway.count=3", *WAIT)
    assert len(release.pods(SPACE, "gateway")) == 3
    release.done("rollback", "first", "1", "-n", SPACE, *WAIT)
    release.until(lambda: len(release.pods(SPACE, "gateway")) == 2, "the number of gateways of revision 1")
    after = {one["metadata"]["uid"] for part in ("learner", "rollout", "store") for one in release.pods(SPACE, part)}
    assert after == before


def test_an_upgrade_adds_workers_and_keeps_those_that_run(release: Cluster) -> None:
    """Kubernetes changes the number of completions of an Indexed Job together with its parallelism."""
    old = release.pod(SPACE, "rollout")["metadata"]["uid"]
    for count in (3, 1):
        numbers = f"gateway.count=2,rollout.count={count}"
        release.done("upgrade", "first", ".", "-n", SPACE, *MINIMAL, "--set", numbers, *WAIT)
        release.until(lambda number=count: len(release.pods(SPACE, "rollout")) == number, f"{count} workers")
        assert release.pods(SPACE, "rollout")[0]["metadata"]["uid"] == old


def test_another_run_file_is_refused_before_it_changes_anything(release: Cluster) -> None:
    before = lasting(release)
    run = '[model]\npath="/model"\n[tasks]\nenvironments={lookup=1.0}\n[learner]\nversions=7\n'
    changes = ("--set", "gateway.count=4", "--set-literal", f"run={run}")
    done = release.helm("upgrade", "first", ".", "-n", SPACE, *MINIMAL, *changes)
    assert done.returncode != 0
    assert "run differs from the installed run file" in done.stderr
    assert lasting(release) == before
    assert len(release.pods(SPACE, "gateway")) == 2
    configuration = ("v1", "ConfigMap", "first-palimpsest-run")
    with pytest.raises(Refused, match="immutable"):
        release.kubernetes.patch(*configuration, {"data": {"run.toml": run}}, SPACE)


def test_another_image_of_a_job_is_refused_and_a_rollback_undoes_the_rest(release: Cluster) -> None:
    """Kubernetes does not change the pods of a Job. Helm reports that after it has changed the other objects."""
    learner = release.pod(SPACE, "learner")["metadata"]["uid"]
    done = release.helm("upgrade", "first", ".", "-n", SPACE, *MINIMAL, "--set", "gateway.count=4,images.gpu.tag=other")
    assert done.returncode != 0
    assert "field is immutable" in done.stderr
    release.until(lambda: len(release.pods(SPACE, "gateway")) == 4, "the change of another object")
    release.done("rollback", "first", "1", "-n", SPACE, *WAIT)
    release.until(lambda: len(release.pods(SPACE, "gateway")) == 2, "the number of gateways of revision 1")
    assert release.pod(SPACE, "learner")["metadata"]["uid"] == learner


def lasting(release: Cluster) -> set[str]:
    """Everything but pods, of which some may still end."""
    return {one for one in release.kubernetes.names(SPACE) if not one.startswith("Pod/")}


def test_an_evicted_pod_is_replaced_and_does_not_count_as_failed(release: Cluster) -> None:
    """A drain deletes the learner and the worker; the first keeps its volume, the second its name."""
    names = {"learner": "learner-0", "rollout": "rollout"}
    old = {component: release.pod(SPACE, component) for component in names}
    failed = {component: job(release, name)["status"].get("failed", 0) for component, name in names.items()}
    for pod in old.values():
        release.kubernetes.evict(pod["metadata"]["name"], SPACE)
    for component, name in names.items():
        release.until(
            lambda part=component: (
                [one["metadata"]["uid"] for one in release.pods(SPACE, part)]
                not in ([], [old[part]["metadata"]["uid"]])
            ),
            f"another pod of {component}",
        )
        assert release.pod(SPACE, component)["spec"]["hostname"] == old[component]["spec"]["hostname"]
        assert job(release, name)["status"].get("failed", 0) == failed[component]
        assert not condition(job(release, name), "Failed")


def test_a_budget_refuses_the_eviction_of_the_second_gateway(release: Cluster) -> None:
    first, second = [one["metadata"]["name"] for one in release.pods(SPACE, "gateway")]
    release.nodes.pause()  # the replacement is not ready before the second eviction
    try:
        release.until(lambda: budget(release, "gateway")["disruptionsAllowed"] == 1, "a budget of one gateway")
        release.kubernetes.evict(first, SPACE)
        with pytest.raises(Refused, match="disruption budget") as refused:
            release.kubernetes.evict(second, SPACE)
        assert refused.value.code == 429
    finally:
        release.nodes.resume()
    release.until(lambda: len(release.pods(SPACE, "gateway")) == 2, "two gateways")


def budget(cluster: Cluster, component: str) -> Document:
    found = cluster.kubernetes.get("policy/v1", "PodDisruptionBudget", f"first-palimpsest-{component}", SPACE)
    assert found is not None
    status: Document = found["status"]
    return status


def test_a_job_ends_or_goes_on_as_the_exit_code_says(cluster: Cluster, render: Callable[..., Rendered]) -> None:
    """One Job for each code, all at once: 0 completes; 2, 4, 5, 6 and 7 fail; others and a clean stop are replaced."""
    cluster.namespace(CODES, "model", "first-palimpsest-learner")
    documents = render("minimal")
    cluster.kubernetes.create(documents.of("ServiceAccount")["first-palimpsest"], CODES)
    for code in (0, *FINAL, *COUNTED, IGNORED):
        for component, name in (("learner", "learner-0"), ("rollout", "rollout")):
            document = documents.of("Job")[f"first-palimpsest-{name}"]
            metadata = {**document["metadata"], "name": f"{component}-{code:d}"}
            cluster.kubernetes.create({**document, "metadata": metadata}, CODES)

    def pods(name: str) -> list[Document]:
        return cluster.kubernetes.list("v1", "Pod", CODES, f"job-name={name}")

    def ended(name: str) -> Document:
        return cluster.kubernetes.get("batch/v1", "Job", name, CODES) or {}

    names = {f"{part}-{code:d}": code for part in ("learner", "rollout") for code in (0, *FINAL, *COUNTED, IGNORED)}
    for name, code in names.items():
        cluster.until(lambda name=name: [one["status"]["phase"] for one in pods(name)] == ["Running"], name)
        cluster.nodes.end(pods(name)[0]["metadata"]["name"], code)
    for name, code in names.items():
        if code == 0:
            cluster.until(lambda name=name: condition(ended(name), "Complete"), f"{name} is complete")
        elif code in FINAL:
            cluster.until(lambda name=name: condition(ended(name), "Failed"), f"{name} failed")
            assert condition(ended(name), "Failed")["reason"] == "PodFailurePolicy"
            assert f"exit code {code:d}" in condition(ended(name), "Failed")["message"]
        else:
            cluster.until(
                lambda name=name, failed=int(code != IGNORED): (
                    ended(name)["status"].get("failed", 0) == failed and len(pods(name)) == 2
                ),
                f"{name} has another pod",
            )
    assert {ended(name)["status"].get("failed", 0) for name, code in names.items() if code == IGNORED} == {0}
    assert {name: len(pods(name)) for name, code in names.items() if code in (0, *FINAL)} == {
        name: 1 for name, code in names.items() if code in (0, *FINAL)
    }


@pytest.mark.parametrize("keep", ["true", "false"])
def test_an_uninstalled_release_leaves_only_what_it_keeps(cluster: Cluster, keep: str) -> None:
    space = cluster.namespace(f"gone-{keep}", "model")
    before = cluster.names(space)
    cluster.done("install", "first", ".", "-n", space, *MINIMAL, "--set", f"learner.volume.keep={keep}", *WAIT)
    cluster.done("uninstall", "first", "-n", space, *WAIT)
    claims = {f"PersistentVolumeClaim/{name}" for name in ("first-palimpsest-learner", "data-first-palimpsest-minio-0")}
    left = claims if keep == "true" else set()
    cluster.until(lambda: cluster.kubernetes.names(space) == before | left, f"only {left} is left")


def test_the_worker_of_a_lost_node_starts_on_another(cluster: Cluster) -> None:
    """The node was lost at the start. Its pod is not a failure, so that a spot market cannot end a run."""
    cluster.until(
        lambda: [one["spec"]["nodeName"] for one in cluster.pods(LOST, "rollout")] == ["spot-1"], "a worker on spot-1"
    )
    worker = job(cluster, "rollout", LOST)
    assert worker["status"].get("failed", 0) == 0
    assert not condition(worker, "Failed")
