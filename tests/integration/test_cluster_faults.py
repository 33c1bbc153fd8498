"""A run over a real Kafka and a real MinIO with every kind of fault loses nothing, counts nothing twice, and ends with
the same weights as a run without faults.

One run has all faults, one after another; `--faults=killed,paused` (of pytest) selects some.

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

import msgspec
import psutil
import pytest

from palimpsest.common.arrays import pack_float32
from palimpsest.common.bus.claim_check import CLAIM
from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.files import write
from palimpsest.common.messages import TRAJECTORIES, encode
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from tests.records.builders import a_finished, a_segment
from tests.runs.run_process import history, scripted
from tests.runs.unsupervised import Services
from tests.servers.cluster import Cluster, cluster
from tools.backends import ports

pytestmark = pytest.mark.servers
VERSIONS = 24
"""The faults wait for 15 versions; the others are trained in between."""
OUTAGE_S = 12.0
"""Longer than a consumer's lease (10 s), so that its partitions have moved when the log is back."""
WORKERS = ("worker-0", "worker-1")
REPEATABLE = (
    "--learner.max_staleness=0",
    f"--learner.versions={VERSIONS}",
    "--tasks.time_limit_s=3600",  # an outage must not drop trajectories, since the clean run drops none
    "--rollout.attempts=100",
)


class Faulty:
    """A run as on several machines: the test starts and restarts every service itself."""

    def __init__(self, cluster: Cluster, toml: Path, name: str) -> None:
        self.cluster, self.name = cluster, name
        folder = toml.parent / name
        self.home = folder / name
        flags = (*cluster.flags, *REPEATABLE, f"--run.id={name}", f"--run.folder={folder}")
        self.services = Services(toml, self.home, *flags, environment=cluster.environment)
        config = load([str(toml), *flags], {}, program="").config
        write(self.home / "run.toml", to_toml(config).encode())  # as `palimpsest run` would: the audit reads it
        self.learners = self.repeated = 0
        for server in ("snapshot_store", "env_gateway"):
            self.server(server)
        for worker in WORKERS:
            self.worker(worker)
        self.learner = self.another_learner()

    def server(self, name: str) -> None:
        """Start the store or the gateway."""
        self.services.start(name, name)

    def worker(self, name: str) -> None:
        """Start a rollout worker."""
        self.services.start(name, "rollout", f"--rollout.worker={name}", f"--rollout.port={ports.free()}")

    def another_learner(self) -> str:
        """Start a learner of two ranks. Returns its name."""
        self.learners += 1
        name = f"learner-{self.learners}"
        self.services.ranks(name, 2)
        return name

    def ranks(self) -> list[psutil.Process]:
        """Processes of the present learner's two ranks."""
        family = psutil.Process(self.services.process(self.learner).pid).children(recursive=True)
        return [process for process in family if "palimpsest.services.learner" in process.cmdline()]

    def versions(self, more: int) -> None:
        """Wait until `more` further versions are trained. No service may fail meanwhile."""
        expected = len(history(self.home)) + more
        assert expected <= VERSIONS, "the run is too short for all faults"
        self.services.until(
            lambda: bool(self.services.died()) or len(history(self.home)) >= expected, f"version {expected}"
        )
        assert self.services.died() == {}

    def sound(self) -> dict[str, Any]:
        """Assert that the audit finds no fault now. Returns its report."""
        report = self.cluster.audit(self.home)
        assert report["sound"], report["findings"]
        return report

    def finished(self) -> dict[str, Any]:
        """Wait for the end of the run. Returns the report of the audit."""
        self.versions(VERSIONS - len(history(self.home)))
        assert self.services.forget(self.learner) == 0
        return self.sound()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Servers of this file only: its test stops them."""
    with cluster(tmp_path_factory.mktemp("cluster")) as both:
        yield both


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """Run file of the clean and the faulty run."""
    return scripted(tmp_path_factory.mktemp("runs"), starting_model, versions=VERSIONS, tokens_per_s=50.0)


@pytest.fixture(scope="module")
def clean(servers: Cluster, toml: Path) -> str:
    """Digest of the last version of a run without faults, under the supervisor."""
    code, output = servers.run(toml, *REPEATABLE, "--run.id=clean").finish()
    assert code == 0, output[-3000:]
    return digest(servers.audit(toml.parent / "clean"))


def digest(report: dict[str, Any]) -> str:
    """Digest of the last version. Asserts that every offered trajectory was trained on."""
    assert report["sound"], report["findings"]
    assert report["trajectories"] == {
        "offered": 16 * VERSIONS, "trained": 16 * VERSIONS, "dropped": {}, "dead_lettered": 0, "pending": 0
    }  # fmt: skip
    last = report["versions"][-1]
    assert last["version"] == VERSIONS
    found: str = last["digest"]
    return found


def killed_services(run: Faulty) -> None:
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


def a_killed_rank(run: Faulty) -> None:
    """Kill one of two ranks: the other must not continue."""
    (one, _) = run.ranks()
    one.kill()
    assert run.services.forget(run.learner) != 0
    run.learner = run.another_learner()


def outages(run: Faulty) -> None:
    """A long and a short outage of the log, and one of the object store. No process may end."""
    run.cluster.kafka.kill()
    time.sleep(OUTAGE_S)
    run.cluster.kafka.start()
    run.versions(1)
    run.cluster.kafka.kill()
    run.cluster.kafka.start()
    run.versions(1)
    run.cluster.minio.stop()
    time.sleep(OUTAGE_S)
    run.cluster.minio.start()


def poison(run: str, group: str) -> Iterator[tuple[RejectCause, Outgoing]]:
    """Invalid records, each with its expected cause of rejection. `group`: an offered group."""
    index = int(group[1:])

    def finished(*segments: Segment, **changes: Any) -> Outgoing:
        record = a_finished(index, 0, run=run, segments=segments)
        return Outgoing(group, encode(msgspec.structs.replace(record, **changes)))

    sound = encode(a_finished(index, 0, run=run))
    yield RejectCause.UNDECODABLE, Outgoing(group, b"\xff\x00garbage")
    yield RejectCause.UNDECODABLE, Outgoing(group, b"")
    yield RejectCause.UNDECODABLE, Outgoing(group, sound[:-7])
    yield RejectCause.UNKNOWN_SCHEMA, Outgoing(group, sound.replace(b"trajectory_finished/1", b"trajectory_finished/9"))
    yield RejectCause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("nan"), -1.0, -1.0])))
    yield RejectCause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("-inf"), -1.0, -1.0])))
    yield RejectCause.LENGTH_MISMATCH, finished(Segment(2, 6, Version(0), pack_float32([-1.0] * 3)))
    yield RejectCause.LENGTH_MISMATCH, finished(a_segment(2, 99, 0))
    yield RejectCause.NEGATIVE_VERSION, finished(a_segment(2, 6, -3))
    yield RejectCause.UNKNOWN_VERSION, finished(a_segment(2, 6, 10_000))
    yield RejectCause.WRONG_RUN, finished(a_segment(2, 6, 0), run="another")
    yield RejectCause.NEVER_OFFERED, Outgoing("g900000", encode(a_finished(900_000, 0, run=run)))
    yield RejectCause.MISSING_CLAIM, Outgoing(group, b"", {CLAIM: "0" * 64})


def bad_records(run: Faulty) -> list[RejectCause]:
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


def a_paused_learner(run: Faulty) -> None:
    """A paused learner ends when it resumes after its replacement."""
    ranks = run.ranks()
    for rank in ranks:
        rank.suspend()
    first, run.learner = run.learner, run.another_learner()
    run.versions(2)
    for rank in ranks:
        rank.resume()
    assert run.services.forget(first) != 0
    assert "another learner took over this run" in run.services.log(first).read_text()


FAULTS: dict[str, Callable[[Faulty], list[RejectCause] | None]] = {
    "killed": killed_services,
    "rank": a_killed_rank,
    "outages": outages,
    "records": bad_records,
    "paused": a_paused_learner,
}


def test_faults_do_not_change_the_trained_weights(
    servers: Cluster, toml: Path, clean: str, pytestconfig: pytest.Config
) -> None:
    chosen = pytestconfig.getoption("--faults")
    run, buried = Faulty(servers, toml, "faulty"), list[RejectCause]()
    try:
        for name in chosen.split(",") if chosen else FAULTS:
            run.versions(1)
            print(f"version {len(history(run.home))}: {name}")  # shows the last fault if the test fails
            buried += FAULTS[name](run) or []
        report = run.finished()
    finally:
        run.services.end()
    assert digest(report) == clean
    assert report["writer"] == run.learners
    assert report["dead_letters"] == {cause.value: n for cause, n in Counter(buried).items()}
    assert report["duplicates"] >= run.repeated
