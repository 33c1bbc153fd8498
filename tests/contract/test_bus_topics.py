"""Contract of every bus adapter: topics, and opening a new log."""

from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from palimpsest.common.bus.port import Bus, Position
from tests.contract.logs import GROUP, PARTITIONS, TOPIC, Log, Spawn, bodies, read_all, receive, things


def test_creating_an_existing_topic_keeps_its_records(bus: Bus) -> None:
    bus.publish(TOPIC, things("a"))
    bus.create_topics({TOPIC: PARTITIONS, "more": 1})
    assert bodies(read_all(bus)) == ["a"]
    assert bus.publish("more", things("b")) == [Position(0, 0)]


def test_a_different_number_of_partitions_is_refused_with_both_numbers(bus: Bus) -> None:
    with pytest.raises(ValueError, match=rf"topic \S*{TOPIC} .* has {PARTITIONS} partitions; the run needs 5"):
        bus.create_topics({"new": 2, TOPIC: 5})
    with pytest.raises(LookupError):
        bus.publish("new", things("a"))


def test_the_error_names_the_unknown_topic(bus: Bus) -> None:
    for use in (lambda: bus.publish("nothing", things("a")), lambda: bus.consumer("nothing")):
        with pytest.raises(LookupError, match="topic nothing does not exist"):
            use()
    with (
        bus.consumer("nothing", group=GROUP, member="m") as consumer,
        pytest.raises(LookupError, match="topic nothing does not exist"),
    ):
        consumer.poll(limit=1, timeout_s=0)


def open_new(log: Log, line: Connection) -> None:
    """Process body: open a log, which may be new, after a message arrives."""
    line.send("ready")
    line.recv()
    with closing(log.open()) as bus:
        bus.create_topics({TOPIC: PARTITIONS})
        bus.publish(TOPIC, things("here"))
    line.send("done")


@pytest.mark.thorough
def test_several_processes_may_open_a_new_log_at_once(log: Log, spawn: Spawn) -> None:
    new = log.another()
    lines = [spawn(open_new, new)[1] for _ in range(3)]
    assert [receive(line) for line in lines] == ["ready"] * 3
    for line in lines:
        line.send("go")
    assert [receive(line) for line in lines] == ["done"] * 3
    with closing(new.open()) as bus:
        assert bodies(read_all(bus)) == ["here"] * 3
