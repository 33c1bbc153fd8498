"""The audit's judge reports every kind of inconsistency and no harmless event."""

from dataclasses import replace

import pytest

from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import Announced, Bounds, Evidence, Finding, Kind, LoggedRecord, Stored
from palimpsest.services.audit.judge import judge
from palimpsest.services.audit.rendering import to_json, to_text
from tests.unit.audit.histories import (
    DIGESTS,
    LOG,
    RECORDS,
    SOUND,
    a_line,
    a_record,
    an_offer,
    checkpoint,
    ledger,
    line,
    log,
)


def kinds(evidence: Evidence) -> set[Kind]:
    return {finding.kind for finding in judge(evidence).findings}


def test_a_consistent_run_has_no_findings() -> None:
    judgement = judge(SOUND)
    assert judgement.findings == ()
    assert judgement.sound
    assert judgement.notes == ()
    assert sorted(judgement.recount.pending) == ["g000003/0", "g000003/1"]
    assert judgement.recount.arrived == {"g000003/0"}
    assert judgement.recount.repeats == 1


HARMLESS = {
    "a group offered again with the same task": log(offers=(*LOG.offers, an_offer(1))),
    "groups offered after the checkpoint": log(offers=(*LOG.offers, an_offer(4), an_offer(5))),
    "a version announced again with the same digest": log(announced=(*LOG.announced, LOG.announced[2])),
    "records above the offsets of resolved trajectories": log(
        arrivals=(*RECORDS, a_record(8, 2, 0), a_record(9, 2, 1))
    ),
    "records of groups that were offered later": log(
        offers=(*LOG.offers, an_offer(4)), arrivals=(*RECORDS, a_record(8, 4, 0))
    ),
    "garbage that a later record replaced": replace(
        log(
            arrivals=(*RECORDS[:6], a_record(8, 2, 1)), letters=LOG.letters,
        ),
        checkpoint=ledger(dead_lettered=0, dropped={"environment_failed": 1, "group_too_small": 1}).checkpoint,
    ),
    "a line that a crash left beyond the checkpoint": replace(
        SOUND, tail=(a_line(2, 3, pending=2, trained=6, staleness=(0, 1)),),
        log=replace(LOG, arrivals=(*RECORDS, a_record(8, 3, 1, oldest=2, newest=2))),
    ),
    "deleted versions below every lease": replace(SOUND, leases={"learner": 2}, stored=SOUND.stored[1:]),
    "versions of a successor after those of a replaced learner": replace(
        SOUND, epoch=2, stored=(*SOUND.stored, Stored(Version(3), DIGESTS[3], 2, 100)),
        commits=((1, 1), (2, 1), (3, 2)),
    ),
    "a trajectory without a record, dropped at its deadline": replace(
        ledger(open_groups={"g000003": {1: "deadline"}}, dropped={"environment_failed": 1, "deadline": 1})
    ),
    "a trajectory that arrived after its deadline": replace(
        log(arrivals=(*RECORDS[:4], a_record(4, 2, 0), *RECORDS[5:])),
        checkpoint=ledger(dropped={"deadline": 1}).checkpoint,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_events_give_no_finding(what: str) -> None:
    assert judge(HARMLESS[what]).findings == ()


WRONG: dict[str, tuple[Kind, Evidence]] = {
    "trained twice": (
        Kind.TRAINED_TWICE, line(1, trained=("g000001/0", "g000000/1")),
    ),
    "trained twice in one batch": (Kind.TRAINED_TWICE, line(1, trained=("g000001/0", "g000001/0"))),
    "trained without being offered": (Kind.TRAINED_UNOFFERED, line(1, trained=("g000001/0", "g000009/1"))),
    "trained without a record": (Kind.TRAINED_WITHOUT_RECORD, log(arrivals=(*RECORDS[:2], *RECORDS[3:]))),
    "trained with an unusable record": (
        Kind.TRAINED_WITHOUT_RECORD, log(arrivals=(*RECORDS[:2], a_record(2, 1, 0, sound=False), *RECORDS[3:])),
    ),
    "a group offered with another task": (
        Kind.TASK_CHANGED, log(offers=(*LOG.offers, an_offer(1, task=("lookup", 7)))),
    ),
    "a group offered with other samples": (Kind.TASK_CHANGED, log(offers=(*LOG.offers, an_offer(1, samples=3)))),
    "a group offered under another's name": (
        Kind.TASK_CHANGED, log(offers=(*LOG.offers, an_offer(5, group="g000006"))),
    ),
    "sums that do not add up": (Kind.SUMS, ledger(dropped={"environment_failed": 2})),
    "a sum below 0": (Kind.SUMS, ledger(dropped={"environment_failed": 1, "deadline": 1, "engine_failed": -1})),
    "sums of a line that do not add up": (Kind.SUMS, line(1, counts={**SOUND.lines[1].counts, "pending": 5})),
    "more offered than the log holds": (Kind.RECOUNT, ledger(offered=9, trained=5)),
    "groups that the log does not hold": (Kind.RECOUNT, ledger(next_index=5)),
    "an open group that was never offered": (
        Kind.RECOUNT, ledger(open_groups={"g000003": {}, "g000044": {0: "deadline", 1: "deadline"}}),
    ),
    "another number of trained": (Kind.RECOUNT, ledger(trained=5, dead_lettered=0)),
    "another number of versions": (Kind.RECOUNT, checkpoint(trained_versions=3)),
    "a line that names fewer than its batch": (Kind.RECOUNT, line(1, batch=3)),
    "trained and pending at once": (Kind.RECOUNT, ledger(open_groups={"g000001": {}})),
    "dropped without a drop record of a worker": (
        Kind.UNEXPLAINED,
        log(arrivals=(*RECORDS[:4], LoggedRecord(0, 4, "g000002/0", "prompt_too_long"), *RECORDS[5:])),
    ),
    "dropped as stale without having arrived": (Kind.UNEXPLAINED, ledger(dropped={"over_staleness": 1})),
    "resolved without a record": (Kind.UNEXPLAINED, log(arrivals=(*RECORDS[:4], *RECORDS[5:]))),
    "a drop in an open group without a record": (
        Kind.UNEXPLAINED,
        ledger(open_groups={"g000003": {1: "engine_failed"}}, dropped={"environment_failed": 1, "engine_failed": 1}),
    ),
    "a dead letter in an open group without a letter": (
        Kind.LETTERS_MISSING, ledger(open_groups={"g000003": {1: "dead_lettered"}}, dead_lettered=2),
    ),
    "an awaited record below the committed offset": (Kind.UNRESOLVED, checkpoint(offsets={0: 7})),
    "a record of an unknown group below the committed offset": (
        Kind.UNRESOLVED,
        replace(log(arrivals=(*RECORDS, a_record(8, 9, 0))), checkpoint=checkpoint(offsets={0: 9}).checkpoint),
    ),
    "fewer dead letters than counted": (Kind.LETTERS_MISSING, log(letters=())),
    "garbage below the frontier without a letter": (
        Kind.LETTERS_MISSING,
        replace(log(arrivals=(*RECORDS[:4], LoggedRecord(0, 4, sound=False), *RECORDS[4:])), samples=2),
    ),
    "versions out of order": (Kind.HISTORY_ORDER, replace(SOUND, lines=SOUND.lines[::-1])),
    "a version twice": (Kind.HISTORY_ORDER, line(1, version=0, published=1)),
    "a line that publishes no new version": (Kind.HISTORY_ORDER, line(1, published=1)),
    "a checkpoint older than its history": (Kind.HISTORY_ORDER, checkpoint(version=Version(1))),
    "a line beyond the checkpoint with an earlier version": (Kind.HISTORY_TAIL, replace(SOUND, tail=(SOUND.lines[1],))),
    "more lines beyond the checkpoint than a crash can leave": (
        Kind.HISTORY_TAIL,
        replace(
            SOUND,
            tail=(
                a_line(2, 3, pending=2, trained=6, staleness=(0, 0)),
                a_line(3, 4, pending=0, trained=8, staleness=(0, 0)),
            ),
        ),
    ),
    "a line beyond the end of the run": (
        Kind.HISTORY_TAIL,
        replace(log(finished=True), tail=(a_line(2, 3, pending=2, trained=6, staleness=(0, 0)),)),
    ),
    "staleness over the bound": (Kind.STALENESS, line(1, staleness=(0, 2))),
    "negative staleness": (Kind.STALENESS, line(1, staleness=(-1, 1))),
    "tokens older than the bound in the log": (
        Kind.STALENESS,
        replace(SOUND, lines=(SOUND.lines[0], replace(SOUND.lines[1], version=2, published=3)),
                checkpoint=checkpoint(version=Version(3)).checkpoint),
    ),
    "another number of masked tokens than in the log": (
        Kind.RECOUNT,
        replace(
            log(arrivals=(RECORDS[0], a_record(1, 0, 1, tokens={-2: 4, 0: 3}), *RECORDS[2:])),
            lines=(replace(SOUND.lines[0], too_old=3), SOUND.lines[1]),
        ),
    ),
    "tokens of the future": (
        Kind.STALENESS, log(arrivals=(*RECORDS[:2], a_record(2, 1, 0, oldest=1, newest=2), *RECORDS[3:])),
    ),
    "an offset beyond the log": (Kind.OFFSET_OUTSIDE, checkpoint(offsets={0: 9})),
    "an offset below the log": (Kind.OFFSET_OUTSIDE, log(bounds={**LOG.bounds, TRAJECTORIES: {0: Bounds(7, 8)}})),
    "an offset of an unknown partition": (Kind.OFFSET_OUTSIDE, checkpoint(task_offsets={0: 4, 7: 0})),
    "a damaged checkpoint": (Kind.CHECKPOINT_DAMAGED, replace(SOUND, damaged=("checkpoint x: torn",))),
    "a version that is missing": (Kind.VERSION_MISSING, replace(SOUND, stored=SOUND.stored[:1])),
    "a version that was trained at and is missing": (
        Kind.VERSION_MISSING,
        replace(log(announced=LOG.announced[2:], applied=()), stored=SOUND.stored[1:], leases={"replica": 1}),
    ),
    "a missing version without a lease": (Kind.VERSION_MISSING, replace(SOUND, leases={})),
    "other weights than announced": (
        Kind.VERSION_DIGEST, replace(SOUND, stored=(SOUND.stored[0], replace(SOUND.stored[1], digest="aa" * 32))),
    ),
    "a worker with other weights": (
        Kind.VERSION_DIGEST, log(applied=(Announced(Version(1), "aa" * 32, by="worker-0"),)),
    ),
    "a checkpoint of other weights": (Kind.VERSION_DIGEST, checkpoint(digest="aa" * 32)),
    "announced twice": (
        Kind.ANNOUNCED_TWICE, log(announced=(*LOG.announced, Announced(Version(2), "aa" * 32))),
    ),
    "a damaged object": (
        Kind.OBJECT_DAMAGED,
        replace(SOUND, stored=(replace(SOUND.stored[0], trouble="its object is torn"), SOUND.stored[1])),
    ),
    "a replaced learner's version": (
        Kind.FENCED_WRITER,
        replace(SOUND, epoch=2, stored=(replace(SOUND.stored[0], writer=2), SOUND.stored[1])),
    ),
    "a replaced learner's checkpoint": (Kind.FENCED_WRITER, replace(SOUND, epoch=2, commits=((1, 2), (2, 1)))),
    "a writer that the store never issued": (Kind.FENCED_WRITER, replace(SOUND, epoch=0)),
    "a damaged store": (Kind.STORE_DAMAGED, replace(SOUND, faults=(Finding(Kind.STORE_DAMAGED, "torn"),))),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_each_inconsistency_is_reported_with_its_kind(what: str) -> None:
    kind, evidence = WRONG[what]
    assert kind in kinds(evidence)
    assert all(finding.sentence for finding in judge(evidence).findings)


READ_ONLY = {Kind.HISTORY_DAMAGED, Kind.CHECKPOINT_UNKNOWN, Kind.VERSION_DAMAGED}
"""Kinds found while reading; tests/integration/test_audit.py tests them."""
OF_EVALUATIONS = {Kind.EVALUATION, Kind.EVALUATION_TRAINED}
"""test_evaluations.py tests them."""


def test_every_kind_has_a_test() -> None:
    assert {kind for kind, _ in WRONG.values()} | READ_ONLY | OF_EVALUATIONS == set(Kind)


@pytest.mark.parametrize("topic", [TASKS, TRAJECTORIES, DEAD_LETTERS])
def test_records_removed_by_retention_give_a_note_and_no_finding(topic: str) -> None:
    """Retention removes the first records; the offsets of the others stay."""
    gone = {
        TASKS: {"offers": LOG.offers[2:]},
        TRAJECTORIES: {"arrivals": RECORDS[4:]},
        DEAD_LETTERS: {"letters": ()},
    }[topic]
    bounds = {**LOG.bounds, topic: {0: Bounds(2, LOG.bounds[topic][0].end + 2)}}
    judgement = judge(log(**gone, bounds=bounds))
    assert judgement.findings == ()
    assert len(judgement.notes) == 1
    assert topic in judgement.notes[0]


def test_without_a_checkpoint_the_log_and_the_store_are_judged() -> None:
    evidence = replace(SOUND, checkpoint=None, lines=(), tail=SOUND.lines, commits=())
    assert judge(evidence).findings == ()
    assert "no checkpoint yet" in judge(evidence).notes[0]
    assert judge(replace(evidence, stored=())).findings[0].kind is Kind.VERSION_MISSING
    assert to_json(evidence, judge(evidence))["trajectories"]["pending"] == 8


def test_the_text_lists_the_sums_and_the_findings() -> None:
    text = list(to_text(SOUND, judge(SOUND)))
    assert text[:2] == ["Run test", ""]
    assert "trajectories   8 offered = 4 trained + 1 dropped + 1 dead-lettered + 2 pending" in text
    assert "  dropped as environment_failed: 1" in text
    assert "  1 of the pending have arrived and wait for training" in text
    assert "  g000003  waits for sample 1" in text
    assert "       2  020202020202       1    100  leased" in text
    assert text[-1] == "No inconsistencies found."
    wrong = ledger(dropped={"environment_failed": 2})
    assert list(to_text(wrong, judge(wrong)))[-2].startswith(
        "1. sums: checkpoint 00000002-00000001: 8 offered - 4 trained"
    )


def test_the_json_has_the_same_values() -> None:
    document = to_json(SOUND, judge(SOUND))
    assert document["sound"]
    assert document["findings"] == []
    assert document["trajectories"] == {
        "offered": 8, "trained": 4, "dropped": {"environment_failed": 1}, "dead_lettered": 1, "pending": 2,
    }  # fmt: skip
    assert document["open_groups"] == {"g000003": [1]}
    assert [one["version"] for one in document["versions"]] == [1, 2]


@pytest.mark.parametrize(("changed", "sound"), [((), False), (((0, 2),), True), (((0, 2), (1, 0)), True)])
def test_a_line_is_judged_by_the_bound_that_held_at_its_version(
    changed: tuple[tuple[int, int], ...], sound: bool
) -> None:
    """The line of version 1 has staleness 2. A bound that was lowered at version 1 waits for the groups in flight."""
    evidence = replace(line(1, staleness=(0, 2)), log=replace(LOG, staleness_changes=changed))
    assert (Kind.STALENESS not in kinds(evidence)) is sound


def test_a_line_is_judged_by_a_lowered_bound_after_the_groups_in_flight() -> None:
    changed = replace(LOG, staleness_changes=((0, 0),))
    assert kinds(replace(line(1, staleness=(0, 1)), log=changed)) == set()
    assert Kind.STALENESS in kinds(replace(line(1, version=2, published=3, staleness=(0, 1)), log=changed))
