"""Random runs: a consistent run has no findings, and every fault put into its evidence is found."""

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import assume, given, settings, strategies as st

from palimpsest.services.audit.evidence import FINISHED, Evidence, Kind
from palimpsest.services.audit.judge import judge
from palimpsest.services.audit.ledger import below
from tests.unit.audit.simulated import Simulated

pytestmark = pytest.mark.thorough


def a_run(seed: int, steps: int) -> Evidence:
    run = Simulated(random.Random(seed))
    for _ in range(steps):
        run.step()
    return run.evidence()


def trained_twice(run: Evidence, rng: random.Random) -> Evidence:
    i = rng.randrange(1, len(run.lines))
    again = rng.choice(run.lines[rng.randrange(i)].trained)
    line = replace(run.lines[i], trained=(again, *run.lines[i].trained[1:]))
    return replace(run, lines=(*run.lines[:i], line, *run.lines[i + 1 :]))


def trained_unoffered(run: Evidence, rng: random.Random) -> Evidence:
    i = rng.randrange(len(run.lines))
    line = replace(run.lines[i], trained=("g777777/0", *run.lines[i].trained[1:]))
    return replace(run, lines=(*run.lines[:i], line, *run.lines[i + 1 :]))


def changed_sum(run: Evidence, rng: random.Random) -> Evidence:
    assert run.checkpoint
    field = rng.choice(["trained", "dead_lettered", "offered"])
    ledger = run.checkpoint.ledger
    ledger = msgspec.structs.replace(ledger, **{field: getattr(ledger, field) + rng.choice([-1, 1, 7])})
    return replace(run, checkpoint=replace(run.checkpoint, ledger=ledger))


def moved_count(run: Evidence, rng: random.Random) -> Evidence:
    """Count one trained trajectory as dead-lettered; the sums still hold."""
    assert run.checkpoint
    ledger = msgspec.structs.replace(
        run.checkpoint.ledger,
        trained=run.checkpoint.ledger.trained - 1,
        dead_lettered=run.checkpoint.ledger.dead_lettered + 1,
    )
    return replace(run, checkpoint=replace(run.checkpoint, ledger=ledger))


def lost_offer(run: Evidence, rng: random.Random) -> Evidence:
    assert run.checkpoint
    i = rng.randrange(run.checkpoint.ledger.next_index)
    return replace(run, log=replace(run.log, offers=(*run.log.offers[:i], *run.log.offers[i + 1 :])))


def changed_task(run: Evidence, rng: random.Random) -> Evidence:
    offer = replace(rng.choice(run.log.offers), task=("lookup", -1))
    return replace(run, log=replace(run.log, offers=(*run.log.offers, offer)))


def lost_record(run: Evidence, rng: random.Random) -> Evidence:
    name = rng.choice(run.lines[rng.randrange(len(run.lines))].trained)
    arrivals = tuple(r for r in run.log.arrivals if not (r.trajectory == name and r.how == FINISHED))
    return replace(run, log=replace(run.log, arrivals=arrivals))


def lost_letter(run: Evidence, rng: random.Random) -> Evidence:
    assert run.checkpoint
    records = {(r.partition, r.offset): r for r in run.log.arrivals}
    gone = [x for x in run.log.letters if below(run.checkpoint, records[x.partition, x.offset])]
    assume(gone)
    letter = rng.choice(gone)
    return replace(run, log=replace(run.log, letters=tuple(x for x in run.log.letters if x != letter)))


def offset_past_an_open_trajectory(run: Evidence, rng: random.Random) -> Evidence:
    assert run.checkpoint
    open_ids = {
        f"{group}/{s}" for group, ended in run.checkpoint.ledger.open_groups.items() for s in range(3) if s not in ended
    }
    buried = {(x.partition, x.offset) for x in run.log.letters}
    skipped = [r for r in run.log.arrivals if r.trajectory in open_ids and (r.partition, r.offset) not in buried]
    assume(skipped)
    record = rng.choice(skipped)
    offsets = {**run.checkpoint.offsets, record.partition: record.offset + 1}
    return replace(run, checkpoint=replace(run.checkpoint, offsets=offsets))


def offset_outside_the_log(run: Evidence, rng: random.Random) -> Evidence:
    assert run.checkpoint
    offsets = {**run.checkpoint.offsets, rng.choice([0, 1]): 10_000}
    return replace(run, checkpoint=replace(run.checkpoint, offsets=offsets))


def lost_version(run: Evidence, rng: random.Random) -> Evidence:
    gone = rng.choice(run.stored)
    return replace(run, stored=tuple(one for one in run.stored if one != gone))


def other_weights(run: Evidence, rng: random.Random) -> Evidence:
    i = rng.randrange(len(run.stored))
    other = replace(run.stored[i], digest="f" * 64)
    return replace(run, stored=(*run.stored[:i], other, *run.stored[i + 1 :]))


def lines_swapped(run: Evidence, rng: random.Random) -> Evidence:
    i = rng.randrange(1, len(run.lines))
    lines = list(run.lines)
    lines[i - 1], lines[i] = lines[i], lines[i - 1]
    return replace(run, lines=tuple(lines))


def older_tokens(run: Evidence, rng: random.Random) -> Evidence:
    late = [line for line in run.lines if line.version > run.max_staleness]
    assume(late)
    name = rng.choice(rng.choice(late).trained)
    arrivals = tuple(
        replace(r, oldest=-5, newest=-5) if r.trajectory == name and r.how == FINISHED else r for r in run.log.arrivals
    )
    return replace(run, log=replace(run.log, arrivals=arrivals))


def lost_line(run: Evidence, rng: random.Random) -> Evidence:
    i = rng.randrange(len(run.lines))
    return replace(run, lines=(*run.lines[:i], *run.lines[i + 1 :]))


FAULTS: dict[Callable[[Evidence, random.Random], Evidence], set[Kind]] = {
    trained_twice: {Kind.TRAINED_TWICE},
    trained_unoffered: {Kind.TRAINED_UNOFFERED},
    changed_sum: {Kind.SUMS},
    moved_count: {Kind.RECOUNT},
    lost_offer: {Kind.RECOUNT},
    changed_task: {Kind.TASK_CHANGED},
    lost_record: {Kind.TRAINED_WITHOUT_RECORD},
    lost_letter: {Kind.LETTERS_MISSING, Kind.UNRESOLVED},
    offset_past_an_open_trajectory: {Kind.UNRESOLVED},
    offset_outside_the_log: {Kind.OFFSET_OUTSIDE},
    lost_version: {Kind.VERSION_MISSING},
    other_weights: {Kind.VERSION_DIGEST},
    lines_swapped: {Kind.HISTORY_ORDER},
    older_tokens: {Kind.STALENESS},
    lost_line: {Kind.RECOUNT},
}
"""Fault -> kinds of finding, at least one of which it must cause."""


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 250))
def test_a_consistent_run_has_no_findings(seed: int, steps: int) -> None:
    assert judge(a_run(seed, steps)).findings == ()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(60, 250))
def test_every_fault_is_found(fault: Callable[..., Evidence], seed: int, steps: int) -> None:
    run = a_run(seed, steps)
    assume(run.checkpoint is not None and len(run.lines) > 1)
    found = {finding.kind for finding in judge(fault(run, random.Random(seed))).findings}
    assert found & FAULTS[fault], found


def test_the_random_runs_cover_every_event() -> None:
    runs = [a_run(seed, 250) for seed in range(20)]
    assert min(len(run.lines) for run in runs) >= 3
    assert sum(len(run.log.letters) for run in runs) > 400
    assert {reason for run in runs if run.checkpoint for reason in run.checkpoint.ledger.dropped} >= {
        "environment_failed", "deadline", "group_too_small",
    }  # fmt: skip
