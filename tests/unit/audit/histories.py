"""Evidence of a consistent run, written by hand.

The run has 4 groups of 2 and a staleness bound of 1. Two groups were trained, one was dropped, and one is open.
"""

from dataclasses import replace
from typing import Any

from palimpsest.common.messages import TASKS, TRAJECTORIES, group_id, trajectory_id
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import (
    FINISHED,
    Announced,
    AuditedCheckpoint,
    Bounds,
    Evidence,
    Letter,
    Line,
    LogContents,
    LoggedRecord,
    Offer,
    Stored,
)
from palimpsest.services.learner.buffer.ledger import LedgerState

DIGESTS = tuple(f"{version:02x}" * 32 for version in range(4))


def an_offer(index: int, **changes: Any) -> Offer:
    return replace(Offer(group_id(index), index, 2, ("lookup", 100 + index)), **changes)


def a_record(offset: int, index: int, sample: int, **changes: Any) -> LoggedRecord:
    """Return a finished record with tokens of version 0."""
    return replace(
        LoggedRecord(0, offset, trajectory_id(group_id(index), sample), FINISHED, oldest=0, newest=0), **changes
    )


def a_line(version: int, index: int, *, pending: int, trained: int, **changes: Any) -> Line:
    line = Line(
        version=version,
        published=version + 1,
        trained=(f"{group_id(index)}/0", f"{group_id(index)}/1"),
        batch=2,
        staleness=(0, version),
        counts={
            "offered": trained + pending, "trained": trained, "dropped": 0, "dead_lettered": 0, "pending": pending,
        },
    )  # fmt: skip
    return replace(line, **changes)


LEDGER = LedgerState(
    next_index=4,
    open_groups={"g000003": {}},
    trained=4,
    dropped={"environment_failed": 1},
    dead_lettered=1,
    offered=8,
)
CHECKPOINT = AuditedCheckpoint(
    name="00000002-00000001",
    version=Version(2),
    writer=1,
    digest=DIGESTS[1],
    trained_versions=2,
    ledger=LEDGER,
    offsets={0: 6},
    task_offsets={0: 4},
)
RECORDS = (
    a_record(0, 0, 0),
    a_record(1, 0, 1),
    a_record(2, 1, 0),
    a_record(3, 1, 1),
    LoggedRecord(0, 4, "g000002/0", "environment_failed"),
    LoggedRecord(0, 5, sound=False),  # garbage; its dead letter names g000002/1
    a_record(6, 3, 0, oldest=2, newest=2),
    a_record(7, 1, 1),  # a harmless repeat
)
LOG = LogContents(
    offers=tuple(an_offer(index) for index in range(4)),
    arrivals=RECORDS,
    letters=(Letter(0, 5, "g000002/1"),),
    announced=tuple(Announced(Version(v), DIGESTS[v]) for v in range(3)),
    applied=(Announced(Version(1), DIGESTS[1], by="worker-0"),),
    bounds={TASKS: {0: Bounds(0, 4)}, TRAJECTORIES: {0: Bounds(0, 8)}, "dead_letters": {0: Bounds(0, 1)}},
    causes={"undecodable": 1},
)
SOUND = Evidence(
    run="test",
    samples=2,
    max_staleness=1,
    every=1,
    log=LOG,
    checkpoint=CHECKPOINT,
    lines=(a_line(0, 0, pending=6, trained=2), a_line(1, 1, pending=4, trained=4)),
    stored=tuple(Stored(Version(v), DIGESTS[v], 1, 100) for v in (1, 2)),
    leases={"learner": 1},
    epoch=1,
    commits=((1, 1), (2, 1)),
)


def log(**changes: Any) -> Evidence:
    """Return the consistent evidence with these changes to its log."""
    return replace(SOUND, log=replace(LOG, **changes))


def checkpoint(**changes: Any) -> Evidence:
    """Return the consistent evidence with these changes to its checkpoint."""
    return replace(SOUND, checkpoint=replace(CHECKPOINT, **changes))


def ledger(**changes: Any) -> Evidence:
    """Return the consistent evidence with these changes to its checkpoint's ledger."""
    import msgspec

    return checkpoint(ledger=msgspec.structs.replace(LEDGER, **changes))


def line(place: int, **changes: Any) -> Evidence:
    """Return the consistent evidence with these changes to one line of its history."""
    lines = list(SOUND.lines)
    lines[place] = replace(lines[place], **changes)
    return replace(SOUND, lines=tuple(lines))
