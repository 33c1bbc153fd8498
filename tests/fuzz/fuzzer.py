"""Publishes mutated records, reads them with every reader, and accounts for each one."""

import random
import time
from collections import Counter
from dataclasses import dataclass

from palimpsest.common.bus.port import Bus, Outgoing
from tests.fuzz.corpus import SHARES, record
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import REJECTED, Place, Readers

ROUND = 200
"""Records between two reads."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the records of one run of the fuzzer."""

    records: int
    outcomes: Counter[str]
    trained: int
    """Trajectories in complete batches."""
    slowest_s: float
    """Most processor time that one record took, in seconds."""
    seconds: float

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.records} records: {outcomes}; {self.trained} trained on; slowest {1e3 * self.slowest_s:.0f} ms of "
            f"processor time; {self.seconds:.0f} s"
        )


def fuzz(bus: Bus, records: int, *, seed: int) -> Figures:
    """Publish this many records and read them. Raises AssertionError unless every record is accounted for."""
    rng, readers, began = random.Random(seed), Readers(bus), time.monotonic()
    topics = rng.choices(list(SHARES), list(SHARES.values()), k=records)
    published: set[Place] = set()
    trained = 0
    for start in range(0, records, ROUND):
        groups = readers.open_groups()
        made: dict[str, list[Outgoing]] = {}
        for topic in topics[start : start + ROUND]:
            one = mutated(record(topic, groups, rng), record(rng.choice(topics), groups, rng), rng)
            made.setdefault(topic, []).append(one)
        for topic, mutants in made.items():
            published |= {(topic, at.partition, at.offset) for at in bus.publish(topic, mutants)}
        readers.read()
        trained += readers.train()
    readers.read()
    outcomes = {place: readers.outcomes.of.get(place, "lost") for place in published}
    lost = [place for place, outcome in outcomes.items() if outcome == "lost"]
    assert not lost, f"{len(lost)} records are not accounted for, {lost[0]} first"
    rejected = {place for place, outcome in outcomes.items() if outcome == REJECTED}
    assert rejected <= readers.letters(), "a record was rejected without a dead letter"
    _check_ledger(readers)
    readers.close()
    return Figures(
        len(published), Counter(outcomes.values()), trained, readers.outcomes.slowest_s, time.monotonic() - began
    )


def _check_ledger(readers: Readers) -> None:
    counts = readers.ingest.ledger.counts()
    dropped = counts.pop("dropped")
    assert isinstance(dropped, dict)
    numbers = {name: int(count) for name, count in counts.items()}  # type: ignore[arg-type]
    ended = numbers["trained"] + sum(dropped.values()) + numbers["dead_lettered"]
    assert numbers["offered"] == ended + numbers["pending"], counts
