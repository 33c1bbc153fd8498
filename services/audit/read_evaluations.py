"""Reads the evaluations of a run: the lines of evaluations.jsonl, and the records on the log."""

from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common import run_folder
from palimpsest.common.messages import GroupOffered, TrajectoryFinished
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.services.audit.evidence import EvaluationLine, EvaluationOffer, EvaluationRecord, Finding, Kind
from palimpsest.services.audit.validity import check_record


def read_evaluations(home: Path) -> tuple[tuple[EvaluationLine, ...], tuple[Finding, ...]]:
    """Return the lines of evaluations.jsonl, and findings about unreadable ones."""
    path = home / run_folder.EVALUATIONS
    lines, findings = [], []
    body = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(body.split(b"\n")[:-1], start=1):  # the part after the last newline is being written
        try:
            lines.append(_line(msgspec.json.decode(text)))
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            findings.append(
                Finding(Kind.HISTORY_DAMAGED, f"{path}, line {number}: {error}: restore the file from a backup")
            )
    return tuple(lines), tuple(findings)


def evaluation_offer(offer: GroupOffered) -> EvaluationOffer:
    """Return the offer as evidence."""
    return EvaluationOffer(offer.group, offer.version, offer.environment, offer.samples)


def evaluation_record(message: Any) -> EvaluationRecord:
    """Return what a worker published for a trajectory of an evaluation, as evidence."""
    if not isinstance(message, TrajectoryFinished):
        return EvaluationRecord(message.trajectory)
    try:
        check_record(message)
    except MalformedTrajectory:
        return EvaluationRecord(message.trajectory)
    versions = tuple(sorted({int(segment.version) for segment in message.segments}))
    return EvaluationRecord(message.trajectory, True, message.success, versions)


def _line(values: dict[str, Any]) -> EvaluationLine:
    counts = values["trajectories"]
    return EvaluationLine(
        version=int(values["version"]),
        offered=int(counts["offered"]),
        scored=int(counts["scored"]),
        dropped={str(reason): int(number) for reason, number in counts["dropped"].items()},
        dead_lettered=int(counts["dead_lettered"]),
        estimates={
            name: (_value(result["avg"]), _value(result["passed"])) for name, result in values["evaluation"].items()
        },
    )


def _value(estimate: dict[str, float] | None) -> float | None:
    return None if estimate is None else float(estimate["value"])
