"""Checks of learners in simulated time (learner_schedules.py), from the folder of the run."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.model.weights import EditableModel
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
from tests.runs.fencing import check_whole
from tests.runs.run_process import history
from tests.servers.direct_store import URL, direct_store
from tests.simulation.cut_schedules import latency
from tests.simulation.learner_faults import SAMPLES, STALENESS, VERSIONS, Fault, Table, configured
from tests.simulation.learner_schedules import LearnerSchedule, simulated
from tests.simulation.simulated_time import SimulatedLoop, run


def run_and_check(
    seed: int,
    folder: Path,
    *,
    plan: Sequence[Fault] = (),
    of_worker: Fault | None = None,
    kind: Callable[..., LearnerSchedule] = LearnerSchedule,
    ranks: int = 1,
    **settings: Any,
) -> LearnerSchedule:
    """Run a schedule to its end and check the result; settings: see `configured`. Raises AssertionError if a check
    fails."""
    chances = random.Random(seed)
    home = configured(folder, **settings).run.home

    async def main(loop: SimulatedLoop) -> LearnerSchedule:
        schedule = kind(
            loop, chances, folder, plan=list(plan), of_worker=of_worker, home=home, stored=store, ranks=ranks
        )
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
            training_changed_the_weights(client)
            if schedule.config.learner.checkpoint.every == 1:  # else a crash repeats announced versions
                nothing_is_trained_on_twice(schedule, client)
            old_logprobs_are_exact(schedule, client)
    return schedule


def kept(schedule: LearnerSchedule, path: Path) -> None:
    """Write the log to the file that the audit reads."""
    bus = SqliteBus(path)
    topics = schedule.store.topics
    bus.create_topics({topic: len(partitions) for topic, partitions in topics.items()})
    for topic, partitions in topics.items():
        records = [record for partition in partitions for record in partition.records]
        at = bus.publish(topic, [Outgoing(record.key, record.body, record.headers) for record in records])
        assert at == [Position(record.partition, record.offset) for record in records]
    bus.close()


def training_changed_the_weights(client: SnapshotClient) -> None:
    """Else no check could tell one version from another. A version whose whole batch is masked repeats the one
    before."""
    first, *_, last = [client.manifest(version).digest for version in client.versions()]
    assert first != last, "no version changed the weights"


def nothing_is_trained_on_twice(schedule: LearnerSchedule, client: SnapshotClient) -> None:
    """No two stored versions were trained on the same trajectory."""
    writers = {version: client.manifest(version).writer for version in client.versions()}
    seen: set[str] = set()
    for version, writer in writers.items():
        batch = {row.trajectory for by, now, row in schedule.trained if (by, now + 1) == (writer, version)}
        assert not batch & seen, f"version {version} of writer {writer} was trained again on {batch & seen}"
        seen |= batch


def old_logprobs_are_exact(schedule: LearnerSchedule, client: SnapshotClient) -> None:
    """Every old log-prob of a row equals that of the weights that sampled the token."""
    tables: dict[Version, Any] = {}
    for version in client.versions():
        model = Table()
        Walker(client, EditableModel(model)).move(version)  # from the base of its chain
        tables[version] = model_scorer(model, torch.device("cpu"))
    for _, _, row in schedule.trained:
        for version in set(row.versions.tolist()) - {UNTRAINABLE}:
            expected = tables[version](pad([row]))[0][: len(row.tokens)]
            for place in (row.versions == version).nonzero()[0] if row.old is not None else ():
                known = row.old[place]
                assert known != known or known == expected[place], f"{row.trajectory}, token {place} of {version}"
