"""The run over a real Kafka and a real MinIO, with everything killed under it: nothing is lost, nothing counted twice,
and the weights at the end are those of the run that nothing happened to.

Rollouts are scripted and the staleness bound is 0, so that every token's version, and with it the weights, follows
from the seed alone: what a fault changes in the training, the digest of the last version shows.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from common.arrays import pack_float32
from common.bus.claims import CLAIM
from common.bus.kafka import Connection, KafkaBus
from common.bus.port import Outgoing
from common.bus.standing import scan
from common.config import load
from common.config.show import show
from common.files import write
from common.messages import TRAJECTORIES, encode
from common.trajectory import Segment
from common.unusable import Cause
from common.versions import Version
from services.local.supervisor import free_port
from tests.builders import a_finished, a_segment
from tests.by_hand import Services
from tests.cluster import Cluster, cluster
from tests.runs import RunProcess, history, scripted, wait_for

pytestmark = pytest.mark.servers
VERSIONS = 20
OUTAGE_S = 30.0
PAUSE_S = 20.0
WITHIN_S = 400.0
REPEATABLE = (
    "--learner.max_staleness=0",
    f"--learner.versions={VERSIONS}",
    "--tasks.time_limit_s=900",  # an outage must not drop anything: the clean run does not either
    "--rollout.attempts=100",
)


@dataclass
class Going:
    """A run that goes on."""

    cluster: Cluster
    process: RunProcess
    home: Path

    def versions(self, more: int) -> None:
        """Wait until so many further versions are trained."""
        wanted = len(history(self.home)) + more
        wait_for(lambda: len(history(self.home)) >= wanted, self.process, within_s=WITHIN_S, name=f"version {wanted}")

    def sound(self) -> dict[str, Any]:
        """What the audit says now; nothing may be wrong."""
        said = self.cluster.audit(self.home)
        assert said["sound"], said["findings"]
        return said

    def finished(self) -> tuple[dict[str, Any], str]:
        """Wait for the end: the audit's words, and the digest of the last version."""
        code, output = self.process.finish(within_s=WITHIN_S)
        assert code == 0, output[-3000:]
        said = self.sound()
        assert said["trajectories"] == {
            "offered": 16 * VERSIONS, "trained": 16 * VERSIONS, "dropped": {}, "dead_lettered": 0, "pending": 0
        }  # fmt: skip
        last = said["versions"][-1]
        assert last["version"] == VERSIONS
        return said, last["digest"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of this file alone: its tests stop them."""
    with cluster(tmp_path_factory.mktemp("cluster")) as both:
        yield both


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """The run file of them all."""
    return scripted(tmp_path_factory.mktemp("runs"), starting_model, versions=VERSIONS, tokens_per_s=50.0)


@pytest.fixture(scope="module")
def clean(servers: Cluster, toml: Path) -> str:
    """Digest of the last version of the run that nothing happens to."""
    return begin(servers, toml, "clean").finished()[1]


def begin(servers: Cluster, toml: Path, name: str) -> Going:
    process = servers.run(toml, *REPEATABLE, f"--run.id={name}")
    return Going(servers, process, toml.parent / name)


def killed(run: Going, service: str) -> None:
    wait_for(lambda: run.process.kill(service), run.process, within_s=60, name=f"a {service} to kill")


def test_killed_services_change_nothing(servers: Cluster, toml: Path, clean: str) -> None:
    run = begin(servers, toml, "killed")
    for service in ("rollout", "env_gateway", "snapshot_store", "learner"):
        run.versions(2)
        killed(run, service)
    run.versions(2)
    (one, *others) = run.process.services()["learner"]
    assert len(others) == 1
    one.kill()
    run.versions(1)
    run.sound()
    assert run.finished()[1] == clean


def test_outages_of_the_log_and_of_the_object_store_change_nothing(servers: Cluster, toml: Path, clean: str) -> None:
    run = begin(servers, toml, "outages")
    run.versions(2)
    servers.kafka.kill()
    time.sleep(OUTAGE_S)
    servers.kafka.start()
    run.versions(2)
    servers.kafka.kill()
    servers.kafka.start()
    run.versions(1)
    servers.minio.stop()
    time.sleep(OUTAGE_S)
    servers.minio.start()
    assert run.finished()[1] == clean
    crashed = [path.name for path in (run.home / "logs").glob("*.log") if "Traceback" in path.read_text()]
    assert crashed == [], "an outage costs time, not processes"


def poison(run: str, group: str) -> Iterator[tuple[Cause, Outgoing]]:
    """Records that no one can use, and what each has to be buried as. `group`: one that was offered."""
    index = int(group[1:])

    def finished(*segments: Segment, **changes: Any) -> Outgoing:
        record = a_finished(index, 0, run=run, segments=segments)
        return Outgoing(group, encode(msgspec.structs.replace(record, **changes)))

    sound = encode(a_finished(index, 0, run=run))
    yield Cause.UNDECODABLE, Outgoing(group, b"\xff\x00garbage")
    yield Cause.UNDECODABLE, Outgoing(group, b"")
    yield Cause.UNDECODABLE, Outgoing(group, sound[:-7])
    yield Cause.UNKNOWN_SCHEMA, Outgoing(group, sound.replace(b"trajectory_finished/1", b"trajectory_finished/9"))
    yield Cause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("nan"), -1.0, -1.0])))
    yield Cause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("-inf"), -1.0, -1.0])))
    yield Cause.LENGTH_MISMATCH, finished(Segment(2, 6, Version(0), pack_float32([-1.0] * 3)))
    yield Cause.LENGTH_MISMATCH, finished(a_segment(2, 99, 0))
    yield Cause.NEGATIVE_VERSION, finished(a_segment(2, 6, -3))
    yield Cause.UNKNOWN_VERSION, finished(a_segment(2, 6, 10_000))
    yield Cause.WRONG_RUN, finished(a_segment(2, 6, 0), run="another")
    yield Cause.NEVER_OFFERED, Outgoing("g900000", encode(a_finished(900_000, 0, run=run)))
    yield Cause.MISSING_CLAIM, Outgoing(group, b"", {CLAIM: "0" * 64})


def test_poison_and_repeated_records_change_nothing(servers: Cluster, toml: Path, clean: str) -> None:
    run = begin(servers, toml, "poison")
    run.versions(3)
    with closing(KafkaBus(Connection(servers.kafka.servers, {}), prefix="palimpsest.poison.")) as bus:
        bad = list(poison("poison", "g000000"))
        bus.publish(TRAJECTORIES, [record for _, record in bad])
        run.versions(2)
        records = [Outgoing(r.key, r.body, r.headers) for r in scan(bus, TRAJECTORIES)]
        records = [record for record in records if record not in [outgoing for _, outgoing in bad]]
        again = records * 2  # each twice more, in any order
        random.Random(7).shuffle(again)
        bus.publish(TRAJECTORIES, again)
    run.versions(2)
    said, digest = run.finished()
    assert digest == clean
    assert said["dead_letters"] == {cause.value: n for cause, n in Counter(cause for cause, _ in bad).items()}
    assert said["duplicates"] >= len(again)


def test_a_learner_that_stood_still_while_another_took_over_changes_nothing(
    servers: Cluster, toml: Path, clean: str
) -> None:
    """Each service by itself, as on several machines: nobody supervises the two learners."""
    home = toml.parent / "paused"
    flags = (*servers.flags, *REPEATABLE, "--run.id=paused")
    services = Services(toml, home, *flags, environment=servers.environment)
    config = load([str(toml), *flags], {}, program="").config
    write(home / "run.toml", show(config).encode())  # as `python -m services` would: the audit reads it
    try:
        for name in ("snapshot_store", "env_gateway"):
            services.start(name, name)
        for worker in ("worker-0", "worker-1"):
            services.start(worker, "rollout", f"--rollout.worker={worker}", f"--rollout.port={free_port('127.0.0.1')}")
        first = services.ranks("first", 2)
        services.until(lambda: len(history(home)) >= 3, "the third version")
        ranks = psutil.Process(first.pid).children(recursive=True)
        for rank in ranks:
            rank.suspend()
        still = time.monotonic()
        trained = len(history(home))
        second = services.ranks("second", 2)
        services.until(lambda: len(history(home)) > trained + 1, "two versions of the second")
        time.sleep(max(0.0, PAUSE_S - (time.monotonic() - still)))
        for rank in ranks:
            rank.resume()
        assert first.wait(timeout=WITHIN_S) != 0
        assert second.wait(timeout=WITHIN_S) == 0, services.log("second").read_text()[-3000:]
        assert "another learner took this run over" in services.log("first").read_text()
    finally:
        services.end()
    said = servers.audit(home)
    assert said["sound"], said["findings"]
    assert said["trajectories"]["trained"] == 16 * VERSIONS
    assert said["versions"][-1]["digest"] == clean
    assert said["writer"] == 2
