"""Contract of every bus adapter: consumer groups."""

import random
from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from palimpsest.common.bus.port import Bus, Consumer, Outgoing, Record
from tests.contract.logs import (
    GROUP,
    KEYS,
    LIMIT_S,
    PARTITIONS,
    TOPIC,
    KafkaLog,
    Log,
    Spawn,
    bodies,
    everything,
    poll_until,
    receive,
    shared,
    take,
    things,
)
from tests.processes.waiting import until

pytestmark = pytest.mark.thorough
ON_KAFKA = pytest.param("kafka", marks=[pytest.mark.servers, pytest.mark.long])
"""Kafka takes up to half a minute for each change of a group whose members poll in turn."""


def test_a_waiting_group_member_receives_new_records(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as consumer:
        assert consumer.poll(limit=10, timeout_s=0.05) == []
        bus.publish(TOPIC, things("news"))
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["news"]


def test_a_group_continues_from_its_commit(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC, group=GROUP, member="first") as consumer:
        assert bodies(take(consumer, 3)) == ["a", "b", "c"]
        consumer.commit({at.partition: 2})
    with bus.consumer(TOPIC, group=GROUP, member="second") as consumer:
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["c"]


def test_a_group_without_commits_starts_at_the_beginning(bus: Bus) -> None:
    bus.publish(TOPIC, things("a"))
    for member in ("first", "second"):
        with bus.consumer(TOPIC, group=GROUP, member=member) as consumer:
            assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["a"]


def test_groups_are_independent(bus: Bus) -> None:
    (at,) = bus.publish(TOPIC, things("a"))
    for group in ("these", "those"):
        with bus.consumer(TOPIC, group=group, member="m") as consumer:
            assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["a"]
            assert consumer.assignment() == frozenset(range(PARTITIONS))
            consumer.commit({at.partition: 1})


def test_a_single_member_gets_every_partition_when_it_polls(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as consumer:
        assert consumer.assignment() == frozenset()
        poll_until(lambda: bool(consumer.assignment()), consumer)
        assert everything(consumer)


def test_members_share_the_partitions_when_one_joins(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a, bus.consumer(TOPIC, group=GROUP, member="b") as b:
        poll_until(lambda: everything(a), a)
        poll_until(lambda: shared(a, b), a, b)
        assert [len(a.assignment()), len(b.assignment())] == [2, 2]


def test_more_members_than_partitions_leave_some_without(bus: Bus) -> None:
    members = [bus.consumer(TOPIC, group=GROUP, member=f"m{i}") for i in range(PARTITIONS + 2)]
    poll_until(lambda: sorted(len(m.assignment()) for m in members) == [0, 0] + [1] * PARTITIONS, *members)
    for member in members:
        member.close()


def test_partitions_of_a_member_that_leaves_go_to_the_others(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a:
        b = bus.consumer(TOPIC, group=GROUP, member="b")
        poll_until(lambda: shared(a, b), a, b)
        b.close()
        poll_until(lambda: len(a.assignment()) == PARTITIONS, a)


@pytest.mark.parametrize("log", ["sqlite", "memory", ON_KAFKA], indirect=True)
def test_every_record_is_read_in_a_storm_of_joins_and_leaves(log: Log, bus: Bus) -> None:
    """Each member commits what it has read; the order of joins and leaves is random."""
    rng, members, published = random.Random(5), dict[str, Consumer](), set[tuple[int, int]]()
    read: set[tuple[int, int]] = set()

    def work() -> bool:
        for member in members.values():
            records = member.poll(limit=7, timeout_s=0.05)
            read.update((record.partition, record.offset) for record in records)
            member.commit({record.partition: record.offset + 1 for record in records})
        return published <= read

    for change in range(5 if isinstance(log, KafkaLog) else 40):
        if len(members) < 2 or (len(members) < 5 and rng.random() < 0.5):
            members[f"m{change}"] = bus.consumer(TOPIC, group=GROUP, member=f"m{change}")
        else:
            members.pop(rng.choice(sorted(members))).close()
        places = bus.publish(TOPIC, [Outgoing(key, b"") for key in rng.sample(KEYS, 10)])
        published |= {(at.partition, at.offset) for at in places}
        work()
    until(work, "the last record")
    for member in members.values():
        member.close()
    with bus.consumer(TOPIC, group=GROUP, member="last") as last:
        poll_until(lambda: everything(last), last)
        assert last.positions() == last.ends(), "the group has committed everything that it read"


def test_an_assignment_changes_only_inside_a_poll(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a, bus.consumer(TOPIC, group=GROUP, member="b") as b:
        poll_until(lambda: everything(a), a)
        b.poll(limit=1, timeout_s=0.5)
        assert everything(a)


@pytest.mark.parametrize("log", ["sqlite", "memory"], indirect=True)
def test_a_member_that_stood_still_continues_from_the_commits_of_its_group(log: Log) -> None:
    """Its own positions are older or newer than those of the members that had its partitions meanwhile.

    Not on Kafka: how long the broker and its client take to let a member in again is theirs to decide.
    """
    with closing(log.with_lease(1.5).open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
        with bus.consumer(TOPIC, group=GROUP, member="sleeper") as sleeper:
            take(sleeper, len(KEYS))
            with bus.consumer(TOPIC, group=GROUP, member="successor") as successor:
                poll_until(lambda: everything(successor), successor)
                successor.commit(dict.fromkeys(range(PARTITIONS), 7))
            firsts: dict[int, int] = {}
            for record in take(sleeper, len(KEYS) - 7 * PARTITIONS):
                firsts.setdefault(record.partition, record.offset)
    assert firsts == dict.fromkeys(range(PARTITIONS), 7)


def test_a_commit_ignores_partitions_that_moved_to_another_member(bus: Bus) -> None:
    bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
    with bus.consumer(TOPIC, group=GROUP, member="a") as a:
        take(a, len(KEYS))
        b = bus.consumer(TOPIC, group=GROUP, member="b")
        poll_until(lambda: shared(a, b), a, b)
        kept, lost = a.assignment(), b.assignment()
        a.commit(dict.fromkeys(range(PARTITIONS), 3))
        b.close()
    with bus.consumer(TOPIC, group=GROUP, member="c") as c:
        expected = dict.fromkeys(kept, 3) | dict.fromkeys(lost, 0)
        firsts: dict[int, int] = {}
        for record in take(c, sum(end - expected[p] for p, end in c.ends().items())):
            firsts.setdefault(record.partition, record.offset)
    assert firsts == dict.fromkeys(kept, 3) | dict.fromkeys(lost, 0)


def work_in_group(log: Log, line: Connection) -> None:
    """Process body: a member that reads, commits the offsets it receives, and polls until it is killed."""
    with closing(log.open()) as bus, bus.consumer(TOPIC, group=GROUP, member="victim") as consumer:
        records: list[Record] = take(consumer, sum(consumer.ends().values()))
        line.send((consumer.assignment(), [(r.partition, r.offset, r.body) for r in records]))
        consumer.commit(line.recv())
        line.send("committed")
        while True:
            consumer.poll(limit=1000, timeout_s=1.0)


def test_records_that_a_killed_member_did_not_commit_are_delivered_again(log: Log, spawn: Spawn) -> None:
    log = log.with_lease(2.0)
    with closing(log.open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, f"{i}".encode()) for key in KEYS for i in range(2)])
        process, line = spawn(work_in_group, log)
        assignment, read = receive(line)
        assert assignment == frozenset(range(PARTITIONS))
        line.send(dict.fromkeys(range(PARTITIONS), 5))
        assert receive(line) == "committed"
        with bus.consumer(TOPIC, group=GROUP, member="survivor") as survivor:
            process.kill()
            process.join()
            ends = survivor.ends()
            records = take(survivor, sum(end - 5 for end in ends.values()))
            assert everything(survivor)
    assert len(read) == 2 * len(KEYS)
    again = {(record.partition, record.offset) for record in records}
    assert again == {(p, offset) for p, end in ends.items() for offset in range(5, end)}


def test_a_dead_member_keeps_its_partitions_until_its_lease_expires(log: Log, spawn: Spawn) -> None:
    log = log.with_lease(1000.0)
    with closing(log.open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
        process, line = spawn(work_in_group, log)
        receive(line)
        process.kill()
        process.join()
        with bus.consumer(TOPIC, group=GROUP, member="survivor") as survivor:
            survivor.poll(limit=1000, timeout_s=0.5)
            assert not everything(survivor)


def test_a_member_that_stopped_polling_cannot_commit_over_its_successor(log: Log) -> None:
    with closing(log.with_lease(1.5).open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
        with (
            bus.consumer(TOPIC, group=GROUP, member="sleeper") as sleeper,
            bus.consumer(TOPIC, group=GROUP, member="successor") as successor,
        ):
            poll_until(lambda: everything(sleeper), sleeper)
            poll_until(lambda: everything(successor), successor)
            successor.commit(dict.fromkeys(range(PARTITIONS), 7))
            sleeper.commit(dict.fromkeys(range(PARTITIONS), 2))
        with bus.consumer(TOPIC, group=GROUP, member="next") as following:
            firsts: dict[int, int] = {}
            for record in take(following, len(KEYS) - 7 * PARTITIONS):
                firsts.setdefault(record.partition, record.offset)
    assert firsts == dict.fromkeys(range(PARTITIONS), 7)
