"""A release of the minimal values as containers: a run of 30 versions, undisturbed and with every disturbance of pods.

Kafka listens on the address of this machine in the network of the pods. The learner and the worker run from the light
image with the packages of this environment mounted: the GPU image needs gigabytes of CUDA.
"""

import functools
import json
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from palimpsest.common.control.access import Role, token_line
from palimpsest.common.user_error import ExitCode
from tests.deploy.conftest import Rendered
from tests.pods import machine
from tests.pods.cluster import NETWORK, Cluster
from tests.pods.podman import Podman
from tests.pods.translation import Objects
from tests.processes import waiting
from tests.runs.run_process import SCRIPTED, history
from tools.backends import ports
from tools.backends.kafka import Kafka
from tools.images import light

pytestmark = [pytest.mark.long, pytest.mark.servers]
VERSIONS, TRAJECTORIES = 30, 480
"""16 trajectories in each version. How many of them are too old to be trained on depends on the speeds."""
TOKENS_PER_S = 10.0
"""So slow that a worker has trajectories in flight most of the time."""
LEARNER, ROLLOUT = "first-palimpsest-learner-0", "first-palimpsest-rollout"
STORE, GATEWAY, MINIO = "first-palimpsest-store", "first-palimpsest-gateway", "first-palimpsest-minio"
SERVICE_TOKEN, PERSON_TOKEN = "a-token-that-all-services-share-0123456789", "a-token-of-a-person-0123456789abcdef"
S3 = {"AWS_ACCESS_KEY_ID": "palimpsest", "AWS_SECRET_ACCESS_KEY": "palimpsest-secret"}
PACKAGES = "/packages"
ROLLOUT_PORT = 7703
PAUSE_S = 0.5
"""Between two looks at the containers: each look starts podman once for every pod."""
SETTINGS = (
    *("--set", "images.light.repository=localhost/palimpsest-light,images.gpu.repository=localhost/palimpsest-light"),
    *("--set", f"objectStore.minio.image={machine.MINIO},access.tokensSecret.name=people"),
    *("--set", "learner.gpu.count=0,rollout.gpu.count=0,learner.shm=1Gi,rollout.shm=1Gi"),
    *(f"--set={part}.extraEnv[0].name=PYTHONPATH" for part in ("learner", "rollout")),
    *(f"--set={part}.extraEnv[0].value={PACKAGES}" for part in ("learner", "rollout")),
)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with machine.started(minio=True) as podman:
        yield podman


@pytest.fixture(scope="module")
def kafka(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker that the pods reach."""
    probe = podman(
        "run", "--detach", f"--network={NETWORK}", light.NAME, "python", "-c", "import time; time.sleep(9e9)"
    )
    (network,) = json.loads(podman("network", "inspect", NETWORK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "HOST", network["subnets"][0]["gateway"])  # which exists while a container runs
        with Kafka(tmp_path_factory.mktemp("kafka")) as server:
            yield server
    podman("rm", "--force", "--time=0", probe)


Install = Callable[..., Cluster]


@pytest.fixture
def install(
    podman: Podman, kafka: Kafka, render: Callable[..., Rendered], starting_model: Path, tmp_path: Path
) -> Iterator[Install]:
    """Render the minimal values with these settings, and start all its pods."""
    made: list[Cluster] = []

    def install(run_id: str, *settings: str) -> Cluster:
        text = SCRIPTED.format(
            folder="/none", model="/none", versions=VERSIONS, tokens_per_s=TOKENS_PER_S, time_limit_s=3600
        )
        run = tmp_path / "run.toml"
        run.write_text(text)
        chart = render(
            "minimal",
            f"--set-file=run={run}",
            f"--set=kafka.servers={kafka.servers},runId={run_id}",
            *SETTINGS,
            *settings,
        )
        claims = {name: tmp_path / name for name in ("first-palimpsest-learner", "data")}
        for claim in claims.values():
            claim.mkdir()
        model = shutil.copytree(starting_model, tmp_path / "model")
        for file in model.iterdir():
            file.chmod(0o644)  # a claim that is mounted read-only gets no fsGroup: its files must be readable to all
        people = [("services", Role.SERVICE, SERVICE_TOKEN), ("ann", Role.OPERATE, PERSON_TOKEN)]
        objects = Objects(
            config_maps={name: one["data"] for name, one in chart.of("ConfigMap").items()},
            secrets={
                "palimpsest-gateway": {"token": SERVICE_TOKEN},
                "palimpsest-s3": dict(zip(("access-key", "secret-key"), S3.values(), strict=True)),
                "people": {"tokens": "".join(f"{token_line(*one)}\n" for one in people)},
            },
            claims={**claims, "model": model},
        )
        pods = tmp_path / "pods"
        pods.mkdir()
        extra = {Path(sysconfig.get_path("purelib")): PACKAGES}
        cluster = Cluster(podman, chart.documents, objects, pods, extra=extra)
        made.append(cluster)
        return cluster

    yield install
    for cluster in made:
        cluster.remove()


def trained(tmp_path: Path, run_id: str) -> int:
    return len(history(tmp_path / "first-palimpsest-learner" / run_id))


def call(cluster: Cluster, worker: int, method: str, path: str) -> dict[str, Any]:
    """Answer of a worker to a person; empty while it cannot answer or refuses."""
    url = f"http://{cluster.podman.address(cluster.workloads[ROLLOUT].pods[worker])}:{ROLLOUT_PORT}{path}"
    try:
        reply = httpx.request(method, url, headers={"Authorization": f"Bearer {PERSON_TOKEN}"}, timeout=60.0)
    except httpx.TransportError:
        return {}
    return dict(reply.json()) if reply.is_success else {}


def wait(cluster: Cluster, holds: Callable[[], bool], name: str) -> None:
    def tended() -> bool:
        cluster.tend()
        failed = [(one, end) for one, it in cluster.workloads.items() for end in it.ends if end[1] == "failed"]
        assert not failed, f"{failed} before {name}: {cluster.tell()}"
        time.sleep(PAUSE_S)
        return holds()

    waiting.until(tended, name, tell=cluster.tell)


def ended(cluster: Cluster, name: str) -> bool:
    return any(end == "done" for _, end in cluster.workloads[name].ends)


def sums(cluster: Cluster) -> dict[str, object]:
    """What the audit counts, in the learner's pod. Only the store's pod has the credentials of the S3."""
    words = ("python", "-m", "palimpsest", "audit", "/etc/palimpsest/run/run.toml", "--json")
    report = json.loads(cluster.run(LEARNER, *words, environment=S3))
    counts = report["trajectories"]
    ended = counts["trained"] + sum(counts["dropped"].values()) + counts["dead_lettered"]
    return {
        "sound": report["sound"],
        "version": report["checkpoint"]["version"],
        "resolved": ended,
        "without an end": counts["offered"] - ended - counts["pending"],
        "dead letters": report["dead_letters"],
    }


CLEAN = {"sound": True, "version": VERSIONS, "resolved": TRAJECTORIES, "without an end": 0, "dead letters": {}}


def test_an_undisturbed_run_ends_with_0_and_a_sound_audit(install: Install, tmp_path: Path) -> None:
    cluster = install("calm")
    cluster.start()
    wait(cluster, lambda: ended(cluster, LEARNER) and ended(cluster, ROLLOUT), "the end of the run")
    assert {name: one.ends for name, one in cluster.workloads.items()} == {
        LEARNER: [(0, "done")], ROLLOUT: [(0, "done")], STORE: [], GATEWAY: [], MINIO: [],
    }  # fmt: skip
    assert trained(tmp_path, "calm") == VERSIONS
    assert sums(cluster) == CLEAN


def test_disturbed_pods_change_only_time(install: Install, tmp_path: Path) -> None:
    """A worker killed, a busy worker evicted, the store replaced, the learner evicted, a worker drained."""
    cluster = install("disturbed", "--set=rollout.count=2")
    cluster.start()
    wait(cluster, lambda: trained(tmp_path, "disturbed") >= 3, "version 3")
    cluster.kill(ROLLOUT, 0)
    wait(cluster, lambda: trained(tmp_path, "disturbed") >= 8, "version 8 after a worker was killed")
    busy = cluster.workloads[ROLLOUT].pods[1]
    wait(cluster, lambda: call(cluster, 1, "GET", "/v1/status").get("live", 0) > 0, "a busy worker")
    cluster.evict(ROLLOUT, 1)
    assert cluster.podman.state(busy)["ExitCode"] == ExitCode.INTERRUPTED, "the grace period was too short"
    assert "draining" in cluster.podman.log(busy, 200)
    wait(cluster, lambda: trained(tmp_path, "disturbed") >= 13, "version 13 after a worker was evicted")
    cluster.evict(STORE)
    wait(cluster, lambda: trained(tmp_path, "disturbed") >= 18, "version 18 after the store was replaced")
    cluster.evict(LEARNER)
    for worker in (0, 1):  # no learner can end the run before they have begun
        ready = functools.partial(call, cluster, worker, "GET", "/readyz")
        waiting.until(lambda ready=ready: bool(ready()), f"worker {worker}", tell=cluster.tell)
    assert call(cluster, 0, "POST", "/v1/actions/drain")["kind"] == "drain"
    wait(cluster, lambda: ended(cluster, LEARNER) and not cluster.workloads[ROLLOUT].pods, "the end of the run")
    ends = {name: one.ends for name, one in cluster.workloads.items()}
    assert ends[LEARNER] == [(ExitCode.INTERRUPTED, "ignored"), (0, "done")]
    assert ends[ROLLOUT] == [(137, "replaced"), (ExitCode.INTERRUPTED, "ignored"), (0, "done"), (0, "done")]
    assert [end for _, end in ends[STORE]] == ["replaced"]
    assert sums(cluster) == CLEAN
