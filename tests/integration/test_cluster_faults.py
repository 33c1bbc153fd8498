"""A run over a real Kafka and a real MinIO with every kind of fault loses nothing, counts nothing twice, and ends with
the same weights as a run without faults.

One run has all faults, one after another; `--faults=killed,paused` (of pytest) selects some. It has no end until then,
because a busy machine trains more versions in between. The run without faults has as many.

Rollouts are scripted and max_staleness is 0, so the seed alone determines every token's version and the weights. If a
fault changes the training, the digest of the last version differs.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import TRAJECTORIES
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import ExitCode
from tests.runs.cluster_run import WORKERS, ClusterRun, poison
from tests.runs.endless import ENDLESS, end_soon
from tests.runs.run_process import history, scripted
from tests.servers.cluster import Cluster, cluster
from tools.backends import ports

pytestmark = pytest.mark.servers
OUTAGE_S = 12.0
"""Longer than a consumer's lease (10 s), so that its partitions have moved when the log is back."""
REPEATABLE = (
    "--learner.max_staleness=0",
    "--tasks.time_limit_s=3600",  # an outage must not drop trajectories, since the clean run drops none
    "--rollout.attempts=100",
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Servers of this file only: its test stops them."""
    with cluster(tmp_path_factory.mktemp("cluster")) as both:
        yield both


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """Run file of the clean and the faulty run."""
    return scripted(tmp_path_factory.mktemp("runs"), starting_model, versions=1, tokens_per_s=50.0)


def clean(servers: Cluster, toml: Path, versions: int) -> str:
    """Digest of the last of these versions of a run without faults, under the supervisor."""
    code, output = servers.run(toml, *REPEATABLE, f"--learner.versions={versions}", "--run.id=clean").finish()
    assert code == 0, output[-3000:]
    return digest(servers.audit(toml.parent / "clean"), versions)


def digest(report: dict[str, Any], versions: int) -> str:
    """Digest of the last version. Asserts that every offered trajectory was trained on."""
    assert report["sound"], report["findings"]
    assert report["trajectories"] == {
        "offered": 16 * versions, "trained": 16 * versions, "dropped": {}, "dead_lettered": 0, "pending": 0
    }  # fmt: skip
    last = report["versions"][-1]
    assert last["version"] == versions
    found: str = last["digest"]
    return found


def killed_services(run: ClusterRun) -> None:
    """Kill and restart both workers together, then the gateway, the store and the learner."""
    for name in WORKERS:
        run.services.kill(name)
    for name in WORKERS:
        run.worker(name)
    for name in ("env_gateway", "snapshot_store"):
        run.versions(1)
        run.services.kill(name)
        run.server(name)
    run.versions(1)
    run.services.kill(run.learner)
    run.learner = run.another_learner()


def a_twin(run: ClusterRun) -> None:
    """Start a second worker of a name that is in use."""
    run.services.start("twin", "rollout", f"--rollout.worker={WORKERS[0]}", f"--rollout.port={ports.free()}")
    assert run.services.forget("twin") == ExitCode.CONFIGURATION
    assert f"already has a rollout process named {WORKERS[0]}" in run.services.log("twin").read_text()


def a_killed_rank(run: ClusterRun) -> None:
    """Kill one of two ranks: the other must not continue."""
    (one, _) = run.ranks()
    one.kill()
    assert run.services.forget(run.learner) != 0
    run.learner = run.another_learner()


def outages(run: ClusterRun) -> None:
    """A long and a short outage of the log, and one of the object store. No process may end."""
    run.cluster.kafka.kill()
    time.sleep(OUTAGE_S)
    run.cluster.kafka.start()
    run.versions(1)
    run.cluster.kafka.kill()
    run.cluster.kafka.start()
    run.versions(1)
    assert isinstance(run.cluster, Cluster)
    run.cluster.minio.stop()
    time.sleep(OUTAGE_S)
    run.cluster.minio.start()


def bad_records(run: ClusterRun) -> list[RejectCause]:
    """Publish invalid records, then two copies of all earlier records in random order. Returns the expected causes."""
    with closing(KafkaBus(Connection(run.cluster.kafka.servers, {}), prefix=f"palimpsest.{run.name}.")) as bus:
        bad = list(poison(run.name, "g000000"))
        bus.publish(TRAJECTORIES, [record for _, record in bad])
        run.versions(1)
        records = [Outgoing(r.key, r.body, r.headers) for r in read_existing(bus, TRAJECTORIES)]
        again = [record for record in records if record not in [outgoing for _, outgoing in bad]] * 2
        random.Random(7).shuffle(again)
        bus.publish(TRAJECTORIES, again)
        run.repeated = len(again)
    run.versions(1)
    return [cause for cause, _ in bad]


def a_paused_learner(run: ClusterRun) -> None:
    """A paused learner ends when it resumes after its replacement."""
    ranks = run.ranks()
    for rank in ranks:
        rank.suspend()
    first, run.learner = run.learner, run.another_learner()
    run.versions(2)  # the paused learner may have written a line more
    for rank in ranks:
        rank.resume()
    assert run.services.forget(first) != 0
    assert "another learner took over this run" in run.services.log(first).read_text()


FAULTS: dict[str, Callable[[ClusterRun], list[RejectCause] | None]] = {
    "killed": killed_services,
    "twin": a_twin,
    "rank": a_killed_rank,
    "outages": outages,
    "records": bad_records,
    "paused": a_paused_learner,
}


def test_faults_do_not_change_the_trained_weights(servers: Cluster, toml: Path, pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--faults")
    run, buried = ClusterRun(servers, toml, "faulty", *REPEATABLE, ENDLESS), list[RejectCause]()
    try:
        for name in chosen.split(",") if chosen else FAULTS:
            run.versions(1)
            print(f"version {len(history(run.home))}: {name}")  # shows the last fault if the test fails
            buried += FAULTS[name](run) or []
        run.versions(1)
        versions = end_soon(f"http://127.0.0.1:{run.services.ports[run.learner]}")
        assert run.services.forget(run.learner) == 0
        report = run.audit()
    finally:
        run.services.end()
    assert digest(report, versions) == clean(servers, toml, versions)
    assert report["writer"] == run.learners
    assert report["dead_letters"] == {cause.value: n for cause, n in Counter(buried).items()}
    assert report["duplicates"] >= run.repeated
