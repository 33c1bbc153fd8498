"""What was trained, as the history has it, against the log, the ledger and the staleness bound. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from palimpsest.common.messages import TASKS, TRAJECTORIES
from palimpsest.services.audit.evidence import FINISHED, Evidence, Finding, Kind, Line, LoggedRecord
from palimpsest.services.audit.recount import Recount, trajectories


def judge_history(evidence: Evidence) -> Iterator[Finding]:
    """Whether the lines follow one another, and the checkpoint follows them."""
    lines, checkpoint = evidence.lines, evidence.checkpoint
    yield from _order((*lines, *evidence.tail))
    for line in (*lines, *evidence.tail):
        yield from _line(line, evidence.max_staleness)
    if checkpoint is None:
        return
    if len(lines) != checkpoint.trained_versions:
        yield Finding(
            Kind.RECOUNT,
            f"checkpoint {checkpoint.name} counts {checkpoint.trained_versions} versions trained, history.jsonl has "
            f"{len(lines)} lines up to it: restore the one that was edited",
        )
    if lines and lines[-1].published > checkpoint.version:
        yield Finding(
            Kind.HISTORY_ORDER,
            f"checkpoint {checkpoint.name} counts the line of version {lines[-1].version}, which made version "
            f"{lines[-1].published}, but is itself of version {checkpoint.version}: restore the one that was edited",
        )
    yield from _tail(evidence)


def judge_training(evidence: Evidence, counted: Recount) -> Iterator[Finding]:
    """Whether each id was trained once, had been offered, stands on the log, and was young enough."""
    log, checkpoint = evidence.log, evidence.checkpoint
    times = Counter(name for line in (*evidence.lines, *evidence.tail) for name in line.trained)
    if twice := [name for name, count in times.items() if count > 1]:
        where = [line.version for line in (*evidence.lines, *evidence.tail) if twice[0] in line.trained]
        yield Finding(
            Kind.TRAINED_TWICE,
            f"{trajectories(len(twice))} trained twice in history.jsonl, {twice[0]} first, at versions "
            f"{_listed(where)}: the weights have learned from it twice; go on from a checkpoint before the second",
        )
    if not log.cut(TASKS) and (strangers := sorted(counted.trained - counted.offered)):
        yield Finding(
            Kind.TRAINED_UNOFFERED,
            f"{trajectories(len(strangers))} trained in history.jsonl without having been offered, {strangers[0]} "
            f"first: another run's log or history lies in this folder; restore its own",
        )
    if checkpoint is not None:
        if len(counted.trained) != checkpoint.ledger.trained:
            yield Finding(
                Kind.RECOUNT,
                f"checkpoint {checkpoint.name} counts {checkpoint.ledger.trained} trajectories as trained, "
                f"history.jsonl lists {len(counted.trained)} up to it: restore the one that was edited",
            )
        if both := sorted(counted.trained & (counted.pending | _ended_otherwise(counted))):
            yield Finding(
                Kind.RECOUNT,
                f"{both[0]} is trained in history.jsonl, but checkpoint {checkpoint.name} has it in an open group as "
                f"something else: restore the one that was edited",
            )
    for line in (*evidence.lines, *evidence.tail):
        yield from _sources(line, counted, evidence)


def _ended_otherwise(counted: Recount) -> frozenset[str]:
    return frozenset(name for name, how in counted.ended_open.items() if how != "trained")


def _order(lines: Sequence[Line]) -> Iterator[Finding]:
    for before, after in pairwise(lines):
        if after.version < before.published:
            yield Finding(
                Kind.HISTORY_ORDER,
                f"history.jsonl: version {after.version} is trained after version {before.published} was made: a line "
                f"was added or moved; restore the file from a copy",
            )
            return


def _line(line: Line, max_staleness: int) -> Iterator[Finding]:
    where = f"history.jsonl, the line of version {line.version}"
    least, greatest = line.staleness
    if least < 0 or greatest > max_staleness:
        yield Finding(
            Kind.STALENESS,
            f"{where}: tokens {least if least < 0 else greatest} versions old were trained on, the bound is 0 to "
            f"{max_staleness}: the learner does not keep its bound; stop the run",
        )
    if line.published <= line.version:
        yield Finding(Kind.HISTORY_ORDER, f"{where}: it made version {line.published}: restore the file from a copy")
    if line.batch != len(line.trained):
        yield Finding(
            Kind.RECOUNT,
            f"{where}: a batch of {line.batch} trajectories, but {len(line.trained)} are named: restore the file",
        )
    counts = line.counts
    ended = counts["trained"] + counts["dropped"] + counts["dead_lettered"]
    if counts["offered"] != ended + counts["pending"] or min(counts.values()) < 0:
        yield Finding(
            Kind.SUMS,
            f"{where}: {counts['offered']} offered are not {ended} ended + {counts['pending']} pending: restore the "
            f"file",
        )


def _tail(evidence: Evidence) -> Iterator[Finding]:
    """Lines beyond the checkpoint: what a crash leaves between one checkpoint and the next, and nothing else."""
    checkpoint, tail = evidence.checkpoint, evidence.tail
    assert checkpoint is not None
    most = evidence.every * (1 + len(evidence.damaged))
    if not tail:
        return
    wrong = ""
    if tail[0].version < checkpoint.version:
        wrong = f"they begin at version {tail[0].version}, and the checkpoint is of {checkpoint.version}"
    elif evidence.log.finished and not evidence.damaged:
        wrong = "and the run was over"
    elif len(tail) > most:
        wrong = f"and a checkpoint comes every {evidence.every}"
    if wrong:
        yield Finding(
            Kind.HISTORY_TAIL,
            f"history.jsonl goes on beyond checkpoint {checkpoint.name} for {len(tail)} lines that no learner can have "
            f"left: {wrong}; cut them off, or restore the file from a copy",
        )


def _sources(line: Line, counted: Recount, evidence: Evidence) -> Iterator[Finding]:
    """What the log says of the trajectories that this line trained."""
    for name in line.trained:
        came = [record for record in counted.heard.get(name, ()) if record.how == FINISHED and record.sound]
        if not came and not evidence.log.cut(TRAJECTORIES):
            yield Finding(
                Kind.TRAINED_UNHEARD,
                f"{name} is trained at version {line.version}, but no record of it stands on the log: the log lost "
                f"records, or the history is another run's; restore it",
            )
            return
        if came and not any(_young(record, line.version, evidence.max_staleness) for record in came):
            first = came[0]
            yield Finding(
                Kind.STALENESS,
                f"{name} is trained at version {line.version}, but its tokens are of versions {first.oldest} to "
                f"{first.newest} (the bound is {evidence.max_staleness}): the learner does not keep its bound; stop it",
            )
            return


def _young(record: LoggedRecord, now: int, max_staleness: int) -> bool:
    if record.oldest is None or record.newest is None:
        return True
    return record.newest <= now and now - record.oldest <= max_staleness


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
