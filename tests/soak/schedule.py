"""The faults of a soak, and their order. The seed gives the order; each fault begins after a further version."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import closing

from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import TRAJECTORIES
from tests.runs.cluster_run import WORKERS, ClusterRun, poison
from tests.servers.cluster import Cluster

OUTAGE_S = 12.0
"""Longer than a consumer's lease (10 s)."""
STEP_S = 3600.0
"""Step of the wall clock of workers, gateway and store."""
REPEATED = 200
"""Number of the last trajectories that are published again."""


def killed_worker(run: ClusterRun, rng: random.Random) -> None:
    name = rng.choice(WORKERS)
    run.services.kill(name)
    run.worker(name)


def killed_gateway(run: ClusterRun, _rng: random.Random) -> None:
    run.services.kill("env_gateway")
    run.server("env_gateway")


def killed_store(run: ClusterRun, _rng: random.Random) -> None:
    run.services.kill("snapshot_store")
    run.server("snapshot_store")


def killed_rank(run: ClusterRun, rng: random.Random) -> None:
    rng.choice(run.ranks()).kill()
    run.services.forget(run.learner)
    run.learner = run.another_learner()


def paused_process(run: ClusterRun, rng: random.Random) -> None:
    process = run.services.process(rng.choice((*WORKERS, "env_gateway", "snapshot_store")))
    process.send_signal(signal.SIGSTOP)
    time.sleep(OUTAGE_S)
    process.send_signal(signal.SIGCONT)


def kafka_outage(run: ClusterRun, _rng: random.Random) -> None:
    run.cluster.kafka.kill()
    time.sleep(OUTAGE_S)
    run.cluster.kafka.start()


def minio_outage(run: ClusterRun, _rng: random.Random) -> None:
    assert isinstance(run.cluster, Cluster), "only with --minio"
    run.cluster.minio.stop()
    time.sleep(OUTAGE_S)
    run.cluster.minio.start()


def clock_step(run: ClusterRun, rng: random.Random) -> None:
    run.offset.write_text(str(rng.choice((-STEP_S, 0.0, STEP_S))))


def poison_records(run: ClusterRun, rng: random.Random) -> None:
    """Publish invalid records, and the last trajectories again in another order."""
    with closing(KafkaBus(Connection(run.cluster.kafka.servers, {}), prefix=f"palimpsest.{run.name}.")) as bus:
        bad = [record for _, record in poison(run.name, "g000000")]
        last = list(read_existing(bus, TRAJECTORIES))[-REPEATED:]
        again = [Outgoing(r.key, r.body, r.headers) for r in last]
        rng.shuffle(again)
        bus.publish(TRAJECTORIES, [*bad, *again])


Fault = Callable[[ClusterRun, random.Random], None]
KILLS: tuple[Fault, ...] = (killed_worker, killed_gateway, killed_store, killed_rank)
OTHERS: tuple[Fault, ...] = (paused_process, kafka_outage, clock_step, poison_records)
