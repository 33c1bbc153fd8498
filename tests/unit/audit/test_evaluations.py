"""The audit's findings about evaluations."""

from dataclasses import replace
from typing import Any

import pytest

from palimpsest.services.audit.evaluations import judge_evaluations, sum_up
from palimpsest.services.audit.evidence import EvaluationLine, EvaluationOffer, EvaluationRecord, Evidence, Kind
from palimpsest.services.audit.judge import judge
from tests.unit.audit.histories import CHECKPOINT, SOUND

OFFERS = tuple(EvaluationOffer(f"e000002-{task:06d}", 2, "lookup", 2) for task in range(2))
RECORDS = tuple(
    EvaluationRecord(f"{offer.group}/{sample}", True, sample == 0, (2,)) for offer in OFFERS for sample in range(2)
)
LINE = EvaluationLine(version=2, offered=4, scored=4, dropped={}, dead_lettered=0, estimates={"lookup": (0.5, 1.0)})


def evidence(
    *, records: tuple[EvaluationRecord, ...] = RECORDS, lines: tuple[EvaluationLine, ...] = (LINE,)
) -> Evidence:
    whole = SOUND
    log = replace(whole.log, evaluation_offers=OFFERS, evaluation_records=records)
    return replace(whole, log=log, evaluations=lines)


def kinds(found: Evidence) -> list[Kind]:
    return [finding.kind for finding in judge_evaluations(found)]


def test_a_supported_result_has_no_finding_and_all_offers_are_accounted_for() -> None:
    assert judge(evidence()).sound
    sums = sum_up(evidence())
    assert sums.offered == sums.scored + sum(sums.dropped.values()) + sums.dead_lettered + sums.unscored == 4


def test_a_trained_evaluation_is_found() -> None:
    sound = evidence()
    line = sound.lines[-1]
    trained = replace(line, trained=(*line.trained[:-1], "e000002-000001/0"))
    found = judge(replace(sound, lines=(*sound.lines[:-1], trained)))
    assert Kind.EVALUATION_TRAINED in [finding.kind for finding in found.findings]


def test_a_marked_group_with_the_id_of_a_training_group_is_found_if_trained() -> None:
    sound = evidence()
    group = sound.lines[0].trained[0].partition("/")[0]
    marked = EvaluationOffer(group, 2, "lookup", 2)
    log = replace(sound.log, evaluation_offers=(*OFFERS, marked))
    assert Kind.EVALUATION_TRAINED in kinds(replace(sound, log=log))


@pytest.mark.parametrize(
    "change",
    [
        {"scored": 3},
        {"offered": 6, "dropped": {"deadline": 2}},
        {"estimates": {"lookup": (0.75, 1.0)}},
        {"estimates": {"lookup": (0.5, 0.5)}},
    ],
    ids=["an end is missing", "offers are missing", "avg@k", "pass@k"],
)
def test_a_result_that_the_log_does_not_support_is_found(change: dict[str, Any]) -> None:
    assert kinds(evidence(lines=(replace(LINE, **change),))) == [Kind.EVALUATION]


@pytest.mark.parametrize(
    "record",
    [replace(RECORDS[0], versions=(2, 3)), replace(RECORDS[0], versions=(1,)), replace(RECORDS[0], sound=False)],
    ids=["two versions", "another version", "unusable"],
)
def test_a_score_needs_a_record_of_the_stated_version_alone(record: EvaluationRecord) -> None:
    assert kinds(evidence(records=(record, *RECORDS[1:]))) == [Kind.EVALUATION]


def test_an_evaluation_without_a_line_is_found_once_the_run_has_finished() -> None:
    unscored = evidence(lines=())
    assert kinds(unscored) == []
    assert sum_up(unscored).unscored == 4
    done = replace(unscored, log=replace(unscored.log, finished=True))
    assert kinds(done) == [Kind.EVALUATION]
    assert kinds(replace(done, checkpoint=replace(CHECKPOINT, evaluated=(2,)))) == []  # abandoned
