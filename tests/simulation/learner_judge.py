"""The verdict on learners in simulated time (learner_schedules.py), from what they leave in the run's folder."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.model.weights import load_weights
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
from tests.runs.fencing import check_whole
from tests.runs.run_process import history
from tests.servers.direct_store import URL, direct_store
from tests.simulation.cut_schedules import latency
from tests.simulation.learner_faults import SAMPLES, STALENESS, VERSIONS, Fault, Table, configured
from tests.simulation.learner_schedules import LearnerSchedule, simulated
from tests.simulation.simulated_time import SimulatedLoop, run


def judged(seed: int, folder: Path, *, plan: Sequence[Fault] = (), of_worker: Fault | None = None) -> LearnerSchedule:
    """A run that is over and sound. Raises AssertionError when it is not."""
    chances = random.Random(seed)
    home = configured(folder).run.home

    async def main(loop: SimulatedLoop) -> LearnerSchedule:
        schedule = LearnerSchedule(loop, chances, folder, plan=list(plan), of_worker=of_worker, home=home, stored=store)
        schedule.deaths = schedule.deaths and of_worker is None and not plan
        with simulated(schedule):
            await schedule.run()
        return schedule

    with direct_store(home / "snapshots") as store:
        schedule: LearnerSchedule = run(main, latency(chances))
        kept(schedule, home / "bus.sqlite")
        check_whole(home, schedule.replaced, samples=SAMPLES, max_staleness=STALENESS)
        assert len(history(home)) == VERSIONS
        with SnapshotClient(URL) as client:
            store.connect(client)
            nothing_is_trained_on_twice(schedule, client)
            old_logprobs_are_exact(schedule, client)
    return schedule


def kept(schedule: LearnerSchedule, path: Path) -> None:
    """The log as a file, where an audit looks for it."""
    bus = SqliteBus(path)
    topics = schedule.store.topics
    bus.create_topics({topic: len(partitions) for topic, partitions in topics.items()})
    for topic, partitions in topics.items():
        records = [record for partition in partitions for record in partition.records]
        at = bus.publish(topic, [Outgoing(record.key, record.body, record.headers) for record in records])
        assert at == [Position(record.partition, record.offset) for record in records]
    bus.close()


def nothing_is_trained_on_twice(schedule: LearnerSchedule, client: SnapshotClient) -> None:
    """Of all versions that were stored no two have learned from one trajectory."""
    writers = {version: client.manifest(version).writer for version in client.versions()}
    seen: set[str] = set()
    for version, writer in writers.items():
        batch = {row.trajectory for by, now, row in schedule.trained if (by, now + 1) == (writer, version)}
        assert not batch & seen, f"version {version} of writer {writer} has learned from {batch & seen} again"
        seen |= batch


def old_logprobs_are_exact(schedule: LearnerSchedule, client: SnapshotClient) -> None:
    """Every old log-prob that came with a row is that of the weights that sampled its token."""
    tables: dict[Version, Any] = {}
    for version in client.versions():
        model = Table()
        load_weights(model, list[RawTensor](client.tensors(client.manifest(version))))
        tables[version] = model_scorer(model, torch.device("cpu"))
    for _, _, row in schedule.trained:
        for version in set(row.versions.tolist()) - {UNTRAINABLE}:
            expected = tables[version](pad([row]))[0][: len(row.tokens)]
            for place in (row.versions == version).nonzero()[0] if row.old is not None else ():
                known = row.old[place]
                assert known != known or known == expected[place], f"{row.trajectory}, token {place} of {version}"
