"""Recounts the evaluations of a run: the offers, the records on the log, and the lines of evaluations.jsonl. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from palimpsest.common.evaluation.estimates import TaskCounts, environment_result
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.messages import TASKS, TRAJECTORIES, trajectory_id
from palimpsest.services.audit.evidence import (
    EvaluationLine,
    EvaluationOffer,
    EvaluationRecord,
    Evidence,
    Finding,
    Kind,
)

TOLERANCE = 1e-9
"""Greatest difference of an estimate that rounding explains."""


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """All evaluations by trajectory."""

    offered: int = 0
    scored: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    dead_lettered: int = 0
    unscored: int = 0
    """Of versions without a line: the evaluation is in progress, or was abandoned when the run continued with a later
    version."""


def sum_up(evidence: Evidence) -> EvaluationSums:
    """Return the sums over the lines and the offers without a line."""
    dropped = Counter[str]()
    for line in evidence.evaluations:
        dropped.update(line.dropped)
    with_line = {line.version for line in evidence.evaluations}
    offers = {offer.group: offer for offer in evidence.log.evaluation_offers}.values()
    return EvaluationSums(
        offered=sum(offer.samples for offer in offers),
        scored=sum(line.scored for line in evidence.evaluations),
        dropped=dict(sorted(dropped.items())),
        dead_lettered=sum(line.dead_lettered for line in evidence.evaluations),
        unscored=sum(offer.samples for offer in offers if offer.version not in with_line),
    )


def judge_evaluations(evidence: Evidence) -> Iterator[Finding]:
    """Yield findings about trained evaluations, and about results that the log does not support."""
    yield from _find_trained(evidence)
    offers: dict[int, dict[str, EvaluationOffer]] = {}
    for offer in evidence.log.evaluation_offers:
        offers.setdefault(offer.version, {})[offer.group] = offer
    records: dict[str, list[EvaluationRecord]] = {}
    for record in evidence.log.evaluation_records:
        records.setdefault(record.trajectory, []).append(record)
    for line in evidence.evaluations:
        yield from _check_line(line, offers.get(line.version, {}), records, evidence)
    if evidence.log.finished and evidence.checkpoint is not None:
        known = {line.version for line in evidence.evaluations} | {*evidence.checkpoint.evaluated}
        for version in sorted(set(offers) - known):
            yield Finding(
                Kind.EVALUATION,
                f"version {version} was offered for evaluation, but evaluations.jsonl has no line of it and the "
                f"checkpoint does not name it, although the run has finished: restore the file from a backup",
            )


def _find_trained(evidence: Evidence) -> Iterator[Finding]:
    marked = {offer.group for offer in evidence.log.evaluation_offers}
    for line in (*evidence.lines, *evidence.tail):
        for name in line.trained:
            group = name.rpartition("/")[0]
            if group in marked or is_evaluation(group):
                yield Finding(
                    Kind.EVALUATION_TRAINED,
                    f"history.jsonl, the line of version {line.version}: {name} is trained on, but it belongs to an "
                    f"evaluation: later evaluations are not of held-out tasks; continue from a checkpoint before it",
                )
                return


def _check_line(
    line: EvaluationLine,
    offers: Mapping[str, EvaluationOffer],
    records: Mapping[str, list[EvaluationRecord]],
    evidence: Evidence,
) -> Iterator[Finding]:
    where = f"evaluations.jsonl, version {line.version}"
    remedy = "restore the file or the log from a backup"
    ended = line.scored + sum(line.dropped.values()) + line.dead_lettered
    if line.offered != ended:
        yield Finding(Kind.EVALUATION, f"{where}: {line.offered} offered, but {ended} ended: {remedy}")
    if evidence.log.cut(TASKS) or evidence.log.cut(TRAJECTORIES):
        return
    if (offered := sum(offer.samples for offer in offers.values())) != line.offered:
        yield Finding(
            Kind.EVALUATION, f"{where}: {line.offered} trajectories offered, the log has offers of {offered}: {remedy}"
        )
        return
    usable = {
        name: found[0]
        for offer in offers.values()
        for sample in range(offer.samples)
        if (found := _scored(records.get(name := trajectory_id(offer.group, sample), ()), line.version))
    }
    if line.scored > len(usable):
        yield Finding(
            Kind.EVALUATION,
            f"{where}: {line.scored} trajectories scored, but the log has {len(usable)} that version {line.version} "
            f"alone sampled: {remedy}",
        )
    elif line.scored == len(usable):
        yield from _check_estimates(line, offers, usable, where)


def _scored(records: "list[EvaluationRecord] | tuple[()]", version: int) -> list[EvaluationRecord]:
    """Return the records that count: finished, valid, and of this version alone."""
    return [record for record in records if record.sound and set(record.versions) <= {version}]


def _check_estimates(
    line: EvaluationLine, offers: Mapping[str, EvaluationOffer], usable: Mapping[str, EvaluationRecord], where: str
) -> Iterator[Finding]:
    """Recompute avg@k and pass@k from the records."""
    tasks: dict[str, list[TaskCounts]] = {}
    most: dict[str, int] = {}
    for offer in offers.values():
        found = [usable[name] for s in range(offer.samples) if (name := trajectory_id(offer.group, s)) in usable]
        tasks.setdefault(offer.environment, []).append(TaskCounts(len(found), sum(record.success for record in found)))
        most[offer.environment] = offer.samples
    for name, (average, passed) in line.estimates.items():
        again = environment_result(tasks.get(name, []), k=most.get(name, 1))
        for what, stated, estimate in (("avg@k", average, again.avg), ("pass@k", passed, again.passed)):
            counted = None if estimate is None else estimate.value
            same = stated == counted or (
                stated is not None and counted is not None and abs(stated - counted) <= TOLERANCE
            )
            if not same:
                yield Finding(
                    Kind.EVALUATION,
                    f"{where}, {name}: {what} is {stated}, but the records on the log give {counted}: restore the "
                    f"file from a backup",
                )
