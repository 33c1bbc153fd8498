"""Renders an audit as text and as JSON. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from palimpsest.common.messages import trajectory_id
from palimpsest.services.audit.evaluations import sum_up
from palimpsest.services.audit.evidence import Evidence, Stored
from palimpsest.services.audit.judge import Judgement
from palimpsest.services.audit.ledger import pending_by_sums
from palimpsest.services.audit.versions import needed_from

PROGRAM = "palimpsest audit"
USAGE = f"""\
usage: {PROGRAM} FOLDER [--quick] [--json]
       {PROGRAM} RUN.toml [--quick] [--json] [--SECTION.KEY=VALUE ...]

Compares the log, the history, the checkpoints and the versions of a run, recounts its trajectories and prints every
inconsistency with a remedy. The audit changes nothing and needs no service, so it also works on an active run.

  FOLDER           the run's folder (runs/ID)
  RUN.toml         the file of a run whose services were started by hand; with --run.id=ID
  --quick          do not read and hash weights and optimizer state
  --json           print JSON

Exit codes: 0 no inconsistency, 1 inconsistencies, 2 no such run, 3 its log or store does not answer."""


def to_text(evidence: Evidence, judgement: Judgement) -> Iterator[str]:
    """Yield the lines of the text."""
    yield f"Run {evidence.run}"
    yield ""
    yield from _format_trajectories(evidence, judgement)
    yield from _format_evaluations(evidence)
    yield ""
    yield from _format_checkpoint(evidence)
    yield from _format_open_groups(evidence, judgement)
    yield ""
    yield from _format_versions(evidence)
    for note in judgement.notes:
        yield ""
        yield f"note: {note}"
    yield ""
    if judgement.sound:
        yield "No inconsistencies found."
        return
    yield f"{len(judgement.findings)} {'inconsistency' if len(judgement.findings) == 1 else 'inconsistencies'}:"
    for number, finding in enumerate(judgement.findings, start=1):
        yield f"{number}. {finding.kind}: {finding.sentence}"


def to_json(evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    """Return the audit as JSON values."""
    checkpoint, counted = evidence.checkpoint, judgement.recount
    return {
        "run": evidence.run,
        "samples_per_group": evidence.samples,
        "max_staleness": evidence.max_staleness,
        "sound": judgement.sound,
        "findings": [{"kind": finding.kind, "sentence": finding.sentence} for finding in judgement.findings],
        "notes": list(judgement.notes),
        "trajectories": _sums(evidence, judgement),
        "evaluations": asdict(sum_up(evidence)),
        "arrived": len(counted.arrived),
        "duplicates": counted.repeats,
        "repeated_offers": len(evidence.log.offers) - len({offer.group for offer in evidence.log.offers}),
        "dead_letters": dict(evidence.log.causes),
        "open_groups": _missing_samples(evidence, judgement),
        "checkpoint": None
        if checkpoint is None
        else {
            "name": checkpoint.name,
            "version": checkpoint.version,
            "writer": checkpoint.writer,
            "trained_versions": checkpoint.trained_versions,
        },
        "writer": evidence.epoch,
        "leases": dict(evidence.leases),
        "versions": [
            {"version": one.version, "digest": one.digest, "writer": one.writer, "bytes": one.bytes}
            for one in evidence.stored
        ],
    }


def _sums(evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    if evidence.checkpoint is None:
        offered = len(judgement.recount.offered)
        return {"offered": offered, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": offered}
    ledger = evidence.checkpoint.ledger
    return {
        "offered": ledger.offered,
        "trained": ledger.trained,
        "dropped": dict(ledger.dropped),
        "dead_lettered": ledger.dead_lettered,
        "pending": pending_by_sums(ledger),
    }


def _format_trajectories(evidence: Evidence, judgement: Judgement) -> Iterator[str]:
    sums, counted = _sums(evidence, judgement), judgement.recount
    dropped = sum(sums["dropped"].values())
    yield (
        f"trajectories   {sums['offered']:,} offered = {sums['trained']:,} trained + {dropped:,} dropped + "
        f"{sums['dead_lettered']:,} dead-lettered + {sums['pending']:,} pending"
    )
    for reason, count in sorted(sums["dropped"].items()):
        yield f"  dropped as {reason}: {count:,}"
    if counted.pending:
        yield f"  {len(counted.arrived):,} of the pending have arrived and wait for training"
    if counted.repeats:
        yield f"  {counted.repeats:,} records on the log repeat an earlier trajectory: ignored"
    if causes := evidence.log.causes:
        numbers = ", ".join(f"{count:,} {cause}" for cause, count in causes.items())
        yield f"  dead letters: {numbers} (`palimpsest dead-letters list` has details)"


def _format_evaluations(evidence: Evidence) -> Iterator[str]:
    sums = sum_up(evidence)
    if sums.offered:
        yield (
            f"evaluations    {sums.offered:,} offered = {sums.scored:,} scored + {sum(sums.dropped.values()):,} "
            f"dropped + {sums.dead_lettered:,} dead-lettered + {sums.unscored:,} without a result"
        )


def _format_checkpoint(evidence: Evidence) -> Iterator[str]:
    if (checkpoint := evidence.checkpoint) is None:
        yield "checkpoint     none"
        return
    yield (
        f"checkpoint     {checkpoint.name} is in force: version {checkpoint.version}, {checkpoint.trained_versions} "
        f"versions trained, by writer {checkpoint.writer} of {evidence.epoch}"
    )


def _format_open_groups(evidence: Evidence, judgement: Judgement) -> Iterator[str]:
    awaited = _missing_samples(evidence, judgement)
    yield f"open groups    {len(awaited)}"
    for group, samples in awaited.items():
        yield f"  {group}  {'waits for sample ' + ', '.join(map(str, samples)) if samples else 'is complete'}"


def _missing_samples(evidence: Evidence, judgement: Judgement) -> dict[str, list[int]]:
    """Return open group -> samples that have not arrived."""
    counted = judgement.recount
    groups = evidence.checkpoint.ledger.open_groups if evidence.checkpoint else dict.fromkeys(counted.offers)
    found = {}
    for group in groups:
        samples = counted.offers[group].samples if group in counted.offers else evidence.samples
        waiting = counted.pending - counted.arrived
        found[group] = [sample for sample in range(samples) if trajectory_id(group, sample) in waiting]
    return found


def _format_versions(evidence: Evidence) -> Iterator[str]:
    leases = ", ".join(f"{holder} needs {lowest} and later" for holder, lowest in sorted(evidence.leases.items()))
    yield f"versions       {len(evidence.stored)} in the store; {leases or 'no lease'}"
    if not evidence.stored:
        return
    rows = [("number", "digest", "writer", "bytes", "")]
    rows += [_version_row(one, evidence.leases, needed_from(evidence)) for one in evidence.stored]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, digest, writer, size, lease in rows:
        cells = (number.rjust(widths[0]), digest.ljust(widths[1]), writer.rjust(widths[2]), size.rjust(widths[3]))
        yield ("  " + "  ".join((*cells, lease))).rstrip()


def _version_row(one: Stored, leases: Mapping[str, int], lowest: int) -> tuple[str, str, str, str, str]:
    lease = "leased" if leases and one.version >= lowest else ""
    return str(one.version), one.digest[:12] or "damaged", str(one.writer), f"{one.bytes:,}", lease
