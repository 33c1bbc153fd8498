"""Finds the inconsistencies in the evidence of a run. Pure.

The audit recounts all sums: it compares the ledger in the checkpoint with the log, the history and itself. It omits
checks that need records which retention removed from the log, and adds a note.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES
from palimpsest.services.audit.evaluations import judge_evaluations
from palimpsest.services.audit.evidence import Evidence, Finding, Kind
from palimpsest.services.audit.ledger import judge_ends, judge_sums, recount
from palimpsest.services.audit.recount import Recount
from palimpsest.services.audit.trained import judge_history, judge_training
from palimpsest.services.audit.versions import judge_versions

_NEEDS = {
    TASKS: "the offers are not recounted",
    TRAJECTORIES: "the ends of trajectories are not recounted",
    DEAD_LETTERS: "dead letters are not recounted",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of an audit."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    recount: Recount

    @property
    def sound(self) -> bool:
        """Whether there are no findings."""
        return not self.findings


def judge(evidence: Evidence) -> Judgement:
    """Return all findings about the run, and notes about omitted checks."""
    counted = recount(evidence)
    findings = [
        *evidence.faults,
        *_find_damaged_checkpoints(evidence),
        *_find_outside_offsets(evidence),
        *judge_history(evidence),
        *judge_training(evidence, counted),
        *judge_sums(evidence, counted),
        *judge_ends(evidence, counted),
        *judge_versions(evidence),
        *judge_evaluations(evidence),
    ]
    return Judgement(tuple(findings), tuple(_collect_notes(evidence)), counted)


def _find_damaged_checkpoints(evidence: Evidence) -> Iterator[Finding]:
    for sentence in evidence.damaged:
        yield Finding(Kind.CHECKPOINT_DAMAGED, sentence)


def _find_outside_offsets(evidence: Evidence) -> Iterator[Finding]:
    checkpoint = evidence.checkpoint
    if checkpoint is None:
        return
    for topic, offsets in ((TRAJECTORIES, checkpoint.offsets), (TASKS, checkpoint.task_offsets)):
        bounds = evidence.log.bounds.get(topic, {})
        for partition, offset in sorted(offsets.items()):
            existing = bounds.get(partition)
            if existing is None or not existing.first <= offset <= existing.end:
                holds = f"holds offsets {existing.first} to {existing.end}" if existing else "has no such partition"
                yield Finding(
                    Kind.OFFSET_OUTSIDE,
                    f"checkpoint {checkpoint.name} reads {topic}[{partition}] from offset {offset}, but the log "
                    f"{holds}: the log was truncated or belongs to another run; restore it",
                )


def _collect_notes(evidence: Evidence) -> Iterator[str]:
    yield from evidence.notes
    for topic, consequence in _NEEDS.items():
        if evidence.log.cut(topic):
            yield f"retention has removed the first records of {topic}: {consequence}"
    if evidence.checkpoint is None:
        yield "there is no checkpoint yet: a restart would begin from the start, so no trajectory counts as trained"
    elif evidence.tail:
        yield (
            f"{len(evidence.tail)} lines of history.jsonl are newer than the checkpoint in force: a restart would "
            f"train those versions again"
        )
