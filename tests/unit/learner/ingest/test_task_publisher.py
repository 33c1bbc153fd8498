"""Offered groups are on the log, a restart restores all of them, and score offsets bound what it reads."""

import random

import msgspec
import numpy as np
import pytest

from palimpsest.common.arrays import pack_int32
from palimpsest.common.bus.port import Bus, Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    OLD_LOGPROBS,
    TASKS,
    TOPICS,
    TRAJECTORIES,
    DropReason,
    GroupOffered,
    decode,
    encode,
)
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.old_logprobs.score_store import old_logprobs_record
from tests.learner_parts.ingest import an_ingest
from tests.records.builders import SAMPLING, a_finished
from tests.simulation.memory_bus import MemoryBus, Store


def started(bus: Bus) -> Ingest:
    """An ingest that has offered four groups."""
    ingest = an_ingest(bus)
    ingest.start({}, {}, {}, now=0.0)
    assert ingest.tasks.offer(Version(0), now=0.0) == 4
    return ingest


def test_offers_are_published_with_task_and_version(bus: SqliteBus) -> None:
    started(bus)
    with bus.consumer(TASKS) as consumer:
        offers: list[GroupOffered] = [decode(TASKS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]
    assert sorted(offer.index for offer in offers) == [0, 1, 2, 3]
    assert len({offer.task_seed for offer in offers}) == 4
    assert {(o.run, o.environment, o.samples, o.version, o.writer) for o in offers} == {("test", "lookup", 2, 0, 1)}


def test_changed_settings_concern_the_groups_that_are_offered_later(bus: SqliteBus) -> None:
    ingest = started(bus)
    ingest.offers.use([(4, 0.5)], time_limit_s=7.0)
    ingest.ledger.expire(now=61.0)
    ingest.tasks.offer(Version(0), now=61.0)
    with bus.consumer(TASKS) as consumer:
        offers: list[GroupOffered] = [decode(TASKS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]
    by_index = {offer.index: (offer.sampling.temperature, offer.time_limit_s) for offer in offers}
    assert by_index == dict.fromkeys(range(4), (1.0, 60)) | dict.fromkeys(range(4, 8), (0.5, 7.0))
    assert [ingest.offers.temperature(index) for index in (0, 3, 4, 9)] == [1.0, 1.0, 0.5, 0.5]
    assert ingest.ledger.expire(now=68.0) == []
    assert len(ingest.ledger.expire(now=68.1)) == 8


def test_groups_of_a_batch_in_training_count_as_unresolved(bus: SqliteBus) -> None:
    ingest = started(bus)
    ingest.ledger.expire(now=61.0)  # four places are free, for example of a batch that was taken
    assert ingest.tasks.offer(Version(0), now=61.0, taken=9) == 0
    assert ingest.tasks.offer(Version(0), now=61.0, taken=3) == 1
    assert ingest.tasks.offer(Version(0), now=61.0) == 3


def test_a_restart_without_a_checkpoint_adopts_all_offers(bus: SqliteBus) -> None:
    started(bus)
    again = an_ingest(bus)
    again.start({}, {}, {}, now=0.0)
    assert again.ledger.counts()["offered"] == 8
    assert again.tasks.offer(Version(0), now=0.0) == 0


FORGED = {
    "samples": {"samples": 10**9},
    "task": {"task_seed": 7},
    "environment": {"environment": "tables"},
    "group": {"group": "g000099"},
    "length": {"sampling": msgspec.structs.replace(SAMPLING, max_turns=99)},
    "learner": {"writer": 4},
    "version": {"version": Version(9)},
}


class OneLearner:
    """See Authority in common/snapshots/control_check.py."""

    def newest_writer(self) -> int:
        return 3

    def newest_version(self) -> Version:
        return Version(2)


@pytest.mark.parametrize("kind", FORGED)
def test_a_restart_adopts_no_forged_offer(bus: SqliteBus, kind: str) -> None:
    """Without the checks the learner would wait for trajectories that it never offered."""
    started(bus)
    with bus.consumer(TASKS) as consumer:
        sound: GroupOffered = decode(TASKS, consumer.poll(limit=1, timeout_s=0)[0].body)
    environment, task_seed = an_ingest(bus).offers.next.task(4)
    next_one = msgspec.structs.replace(
        sound, group="g000004", index=4, environment=environment, task_seed=task_seed, writer=3
    )
    forged = msgspec.structs.replace(next_one, **FORGED[kind])
    bus.publish(TASKS, [Outgoing(forged.group, encode(forged))])
    again = an_ingest(bus, epoch=3, control=ControlCheck(OneLearner()))
    again.start({}, {}, {}, now=0.0)
    assert (again.ledger.next_index, again.ledger.counts()["offered"]) == (4, 8)
    bus.publish(TASKS, [Outgoing(next_one.group, encode(next_one))])
    again = an_ingest(bus, epoch=3, control=ControlCheck(OneLearner()))
    again.start({}, {}, {}, now=0.0)
    assert (again.ledger.next_index, again.ledger.counts()["offered"]) == (5, 10)


def test_offers_of_an_earlier_release_are_adopted(bus: SqliteBus) -> None:
    started(bus)
    with bus.consumer(TASKS) as consumer:
        offers: list[GroupOffered] = [decode(TASKS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]
    old = MemoryBus(Store())
    old.create_topics(dict.fromkeys(TOPICS, 2))
    old.publish(TASKS, [Outgoing(o.group, encode(msgspec.structs.replace(o, writer=0))) for o in offers])
    again = an_ingest(old, control=ControlCheck(OneLearner()))
    again.start({}, {}, {}, now=0.0)
    assert again.ledger.next_index == 4


def score(bus: Bus, trajectory: str) -> Position:
    """Publish old log-probs of a trajectory and return their position."""
    message = old_logprobs_record(
        run="test", trajectory=trajectory, by="replica-0", tokens=pack_int32([1, 2]), start=1, stop=2,
        version=Version(0), digest="d", values=np.array([-1.0], dtype=np.float32),
    )  # fmt: skip
    (at,) = bus.publish(OLD_LOGPROBS, [Outgoing(trajectory, encode(message))])
    return at


def test_scores_of_resolved_trajectories_are_not_read_again(bus: SqliteBus) -> None:
    """A batch holds two groups and two batches are open; each offer records the end of the score topic."""
    ingest = started(bus)
    assert ingest.tasks.score_offsets() == {0: 0, 1: 0}
    for group in (0, 1):
        records = [a_finished(group, sample) for sample in (0, 1)]
        bus.publish(TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records])
        score(bus, f"g{group:06d}/0")
    with bus.consumer(OLD_LOGPROBS) as consumer:
        ends = consumer.ends()
    assert sum(ends.values()) == 2
    ingest.reader.read_all(Version(0), timeout_s=0)
    assert ingest.ledger.take_batch(Version(0)) is not None
    assert ingest.tasks.offer(Version(1), now=0.0) == 2
    assert ingest.tasks.score_offsets() == {0: 0, 1: 0}, "groups 2 and 3 were offered before anything was scored"
    ingest.ledger.expire(now=61.0)  # groups 2 and 3 are dropped
    assert ingest.ledger.oldest_open() is None
    score(bus, "g000004/0")
    assert ingest.tasks.score_offsets() == ends


def test_a_restart_reads_every_score_of_a_pending_trajectory(bus: SqliteBus) -> None:
    """For random orders of offers, scores, ends, and restarts."""
    chances = random.Random(3)
    ingest = started(bus)
    places: dict[str, list[Position]] = {}
    least = 0
    for _ in range(400):
        names = [f"g{index:06d}/{sample}" for index in range(ingest.ledger.next_index) for sample in (0, 1)]
        awaited = [name for name in names[-40:] if ingest.ledger.is_pending(name)]
        match chances.choice(("score", "score", "end", "end", "offer", "restart")):
            case "score":  # includes late scores of resolved trajectories
                name = chances.choice(names[-12:])
                places.setdefault(name, []).append(score(bus, name))
            case "end" if awaited:
                name = chances.choice(awaited)
                ingest.ledger.drop(name.partition("/")[0], name, DropReason.DEADLINE)
            case "offer":
                ingest.tasks.offer(Version(0), now=0.0)
            case "restart":
                state, kept = ingest.ledger.state(), ingest.tasks.score_offsets()
                if chances.random() < 0.5:  # a group is offered after the checkpoint
                    ingest.tasks.offer(Version(0), now=0.0)
                tasks = ingest.tasks.offsets()
                ingest.close()
                ingest = an_ingest(bus)
                ingest.ledger.restore(state, now=0.0)
                ingest.start({}, tasks, kept, now=0.0)
        begin = ingest.tasks.score_offsets()
        for name, positions in places.items():
            if ingest.ledger.is_pending(name):
                assert all(at.offset >= begin.get(at.partition, 0) for at in positions)
        assert sum(begin.values()) >= least, "score offsets never decrease"
        least = sum(begin.values())
    assert ingest.ledger.next_index > 30
    assert least > 0.8 * sum(map(len, places.values())), "nearly all scores are skipped"
    ingest.close()


def test_a_truncated_score_log_stops_the_run_if_the_checkpoint_needs_it() -> None:
    bus = MemoryBus(Store())
    bus.create_topics(dict.fromkeys(TOPICS, 1))
    for _ in range(9):
        score(bus, "g000000/0")
    bus.store.cut(OLD_LOGPROBS, 0, before=5)
    for offsets in ({}, {0: 5}, {0: 9}):  # {}: a checkpoint without score offsets
        ingest = an_ingest(bus)
        ingest.start({}, {}, offsets, now=0.0)
        assert ingest.tasks.score_offsets() == offsets
    for lost in ({0: 4}, {0: 10}, {1: 0}):
        with pytest.raises(UserError, match=rf"all records after the checkpoint: .*{OLD_LOGPROBS}") as error:
            an_ingest(bus).start({}, {}, lost, now=0.0)
        assert error.value.code is ExitCode.DAMAGED
