"""Pods of the chart's minimal values as real containers of this machine: Podman starts them.

The learner runs from the light image with the packages of this environment mounted, because the GPU image needs
gigabytes of CUDA. A machine that makes no namespaces cannot run these tests: they are skipped, with the reason.
"""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from palimpsest.common.control.access import Role, token_line
from palimpsest.common.user_error import ExitCode
from tests.deploy.conftest import Rendered
from tests.pods import machine
from tests.pods.cluster import Cluster
from tests.pods.podman import Podman
from tests.pods.translation import Objects
from tests.processes import waiting
from tests.runs.run_process import SCRIPTED

pytestmark = [pytest.mark.long, pytest.mark.servers]
LEARNER, GATEWAY = "first-palimpsest-learner-0", "first-palimpsest-gateway"
SERVICE_TOKEN = "a-token-that-all-services-share-0123456789"
GATEWAY_PORT = 7702
PACKAGES = "/packages"
SETTINGS = (
    *("--set", "images.light.repository=localhost/palimpsest-light,images.gpu.repository=localhost/palimpsest-light"),
    *("--set", "access.tokensSecret.name=people,learner.gpu.count=0,learner.shm=1Gi,model.subPath=missing"),
    *("--set", f"learner.extraEnv[0].name=PYTHONPATH,learner.extraEnv[0].value={PACKAGES}"),
)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with machine.started() as podman:
        yield podman


@pytest.fixture
def cluster(podman: Podman, render: Callable[..., Rendered], starting_model: Path, tmp_path: Path) -> Cluster:
    """A release whose run file names a folder without a model."""
    run = tmp_path / "run.toml"
    run.write_text(SCRIPTED.format(folder="/none", model="/none", versions=1, tokens_per_s=200.0, time_limit_s=3600))
    chart = render("minimal", f"--set-file=run={run}", *SETTINGS)
    claim, pods = tmp_path / "claim", tmp_path / "pods"
    claim.mkdir()
    pods.mkdir()
    objects = Objects(
        config_maps={name: one["data"] for name, one in chart.of("ConfigMap").items()},
        secrets={
            "palimpsest-gateway": {"token": SERVICE_TOKEN},
            "people": {"tokens": f"{token_line('services', Role.SERVICE, SERVICE_TOKEN)}\n"},
        },
        claims={"first-palimpsest-learner": claim, "model": starting_model},
    )
    extra = {Path(sysconfig.get_path("purelib")): PACKAGES}
    return Cluster(podman, chart.documents, objects, pods, extra=extra)


def test_a_job_fails_at_once_with_the_sentence_of_its_error(cluster: Cluster) -> None:
    """Code 2: a restart would end in the same way."""
    container = cluster.start_one(LEARNER)

    def failed() -> bool:
        cluster.tend()
        return bool(cluster.workloads[LEARNER].ends)

    waiting.until(failed, "the failure of the Job", tell=cluster.tell)
    assert cluster.workloads[LEARNER].ends == [(ExitCode.CONFIGURATION, "failed")]
    message = cluster.message(container)
    assert message.startswith("model.path: /model/missing does not exist")
    assert "Traceback" not in message


def test_an_evicted_gateway_ends_in_its_grace_period_and_is_replaced(cluster: Cluster) -> None:
    """Without root and capabilities, on a read-only root, with tokens that only the pod's group can read."""

    def ready() -> bool:
        address = cluster.podman.address(cluster.workloads[GATEWAY].pods[0])
        try:
            return httpx.get(f"http://{address}:{GATEWAY_PORT}/readyz", timeout=5.0).is_success
        except httpx.TransportError:
            return False

    first = cluster.start_one(GATEWAY)
    waiting.until(ready, "the gateway", tell=cluster.tell)
    address = cluster.podman.address(first)
    status = f"http://{address}:{GATEWAY_PORT}/v1/status"
    assert httpx.get(status, timeout=60.0).status_code == 401
    assert httpx.get(status, headers={"Authorization": f"Bearer {SERVICE_TOKEN}"}, timeout=60.0).status_code == 200
    cluster.evict(GATEWAY)
    cluster.tend()
    assert cluster.workloads[GATEWAY].ends == [(ExitCode.INTERRUPTED, "replaced")]
    assert cluster.workloads[GATEWAY].pods[0] != first
    waiting.until(ready, "the gateway that replaced it", tell=cluster.tell)
