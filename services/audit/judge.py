"""Judges a run: from what was read to what is wrong. Pure.

Nothing here trusts a sum that could be counted: the ledger in the checkpoint is set against the log, the history and
itself. What depends on records that the log no longer holds is left out, and a note says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES
from palimpsest.services.audit.evidence import Evidence, Finding, Kind
from palimpsest.services.audit.ledger import judge_ends, judge_sums, recount
from palimpsest.services.audit.recount import Recount
from palimpsest.services.audit.trained import judge_history, judge_training
from palimpsest.services.audit.versions import judge_versions

_NEEDS = {
    TASKS: "what was offered is not recounted",
    TRAJECTORIES: "how trajectories ended is not recounted",
    DEAD_LETTERS: "dead letters are not recounted",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of an audit."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    recount: Recount

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def judge(evidence: Evidence) -> Judgement:
    """Everything that is wrong with the run, and what could not be judged."""
    counted = recount(evidence)
    findings = [
        *evidence.faults,
        *_damaged(evidence),
        *_offsets(evidence),
        *judge_history(evidence),
        *judge_training(evidence, counted),
        *judge_sums(evidence, counted),
        *judge_ends(evidence, counted),
        *judge_versions(evidence),
    ]
    return Judgement(tuple(findings), tuple(_notes(evidence)), counted)


def _damaged(evidence: Evidence) -> Iterator[Finding]:
    for sentence in evidence.damaged:
        yield Finding(Kind.CHECKPOINT_DAMAGED, sentence)


def _offsets(evidence: Evidence) -> Iterator[Finding]:
    checkpoint = evidence.checkpoint
    if checkpoint is None:
        return
    for topic, offsets in ((TRAJECTORIES, checkpoint.offsets), (TASKS, checkpoint.task_offsets)):
        bounds = evidence.log.bounds.get(topic, {})
        for partition, offset in sorted(offsets.items()):
            stands = bounds.get(partition)
            if stands is None or not stands.first <= offset <= stands.end:
                holds = f"holds offsets {stands.first} to {stands.end}" if stands else "has no such partition"
                yield Finding(
                    Kind.OFFSET_OUTSIDE,
                    f"checkpoint {checkpoint.name} reads {topic}[{partition}] from offset {offset}, but the log "
                    f"{holds}: the log was cut or is another run's; restore it",
                )


def _notes(evidence: Evidence) -> Iterator[str]:
    yield from evidence.notes
    for topic, consequence in _NEEDS.items():
        if evidence.log.cut(topic):
            yield f"the log of {topic} no longer reaches back to the beginning (retention): {consequence}"
    if evidence.checkpoint is None:
        yield "there is no checkpoint yet: a restart would begin anew, so nothing counts as trained"
    elif evidence.tail:
        yield (
            f"{len(evidence.tail)} lines of history.jsonl lie beyond the checkpoint in force: a restart would train "
            f"those versions again"
        )
