"""Compares the trained trajectories in the history with the log, the ledger and the staleness bound. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from palimpsest.common.messages import TASKS, TRAJECTORIES
from palimpsest.common.text import count
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import FINISHED, Evidence, Finding, Kind, Line, LoggedRecord
from palimpsest.services.audit.recount import Recount, trajectories


def judge_history(evidence: Evidence) -> Iterator[Finding]:
    """Yield findings about the order of the history lines, and about their agreement with the checkpoint."""
    lines, checkpoint, bound = evidence.lines, evidence.checkpoint, evidence.bound
    yield from _find_disorder((*lines, *evidence.tail))
    for line in (*lines, *evidence.tail):
        yield from _check_line(line, bound.allowed(Version(line.version)))
    if checkpoint is None:
        return
    if len(lines) != checkpoint.trained_versions:
        yield Finding(
            Kind.RECOUNT,
            f"checkpoint {checkpoint.name} counts {checkpoint.trained_versions} versions trained, history.jsonl has "
            f"{len(lines)} lines up to it: restore the file that was edited",
        )
    if lines and lines[-1].published > checkpoint.version:
        yield Finding(
            Kind.HISTORY_ORDER,
            f"checkpoint {checkpoint.name} counts the line of version {lines[-1].version}, which made version "
            f"{lines[-1].published}, but is of version {checkpoint.version}: restore the file that was edited",
        )
    yield from _check_tail(evidence)


def judge_training(evidence: Evidence, counted: Recount) -> Iterator[Finding]:
    """Yield findings about ids that were trained twice, without an offer, without a record, or too stale."""
    log, checkpoint = evidence.log, evidence.checkpoint
    times = Counter(name for line in (*evidence.lines, *evidence.tail) for name in line.trained)
    if twice := [name for name, count in times.items() if count > 1]:
        where = [line.version for line in (*evidence.lines, *evidence.tail) if twice[0] in line.trained]
        yield Finding(
            Kind.TRAINED_TWICE,
            f"{trajectories(len(twice))} trained twice in history.jsonl, {twice[0]} first, at versions "
            f"{_join_numbers(where)}: continue from a checkpoint before the second one",
        )
    if not log.cut(TASKS) and (unknown := sorted(counted.trained - counted.offered)):
        yield Finding(
            Kind.TRAINED_UNOFFERED,
            f"{trajectories(len(unknown))} trained in history.jsonl without an offer, {unknown[0]} "
            f"first: the folder holds the log or the history of another run; restore those of this run",
        )
    if checkpoint is not None:
        if len(counted.trained) != checkpoint.ledger.trained:
            yield Finding(
                Kind.RECOUNT,
                f"checkpoint {checkpoint.name} counts {checkpoint.ledger.trained} trajectories as trained, "
                f"history.jsonl lists {len(counted.trained)} up to it: restore the file that was edited",
            )
        if both := sorted(counted.trained & (counted.pending | _ended_otherwise(counted))):
            yield Finding(
                Kind.RECOUNT,
                f"{both[0]} is trained in history.jsonl, but checkpoint {checkpoint.name} has it in an open group as "
                f"not trained: restore the file that was edited",
            )
    bound = evidence.bound
    for line in (*evidence.lines, *evidence.tail):
        allowed = bound.allowed(Version(line.version))
        yield from _check_sources(line, counted, allowed, whole_log=not log.cut(TRAJECTORIES))
        yield from _check_masked(line, counted, allowed)


def _ended_otherwise(counted: Recount) -> frozenset[str]:
    return frozenset(name for name, how in counted.ended_open.items() if how != "trained")


def _find_disorder(lines: Sequence[Line]) -> Iterator[Finding]:
    for before, after in pairwise(lines):
        if after.version < before.published:
            yield Finding(
                Kind.HISTORY_ORDER,
                f"history.jsonl: version {after.version} is trained after version {before.published} was published: a "
                f"line was added or moved; restore the file from a backup",
            )
            return


def _check_line(line: Line, max_staleness: int) -> Iterator[Finding]:
    where = f"history.jsonl, the line of version {line.version}"
    least, greatest = line.staleness
    if least < 0 or greatest > max_staleness:
        yield Finding(
            Kind.STALENESS,
            f"{where}: trained on tokens with staleness {least if least < 0 else greatest}, but the bounds are 0 and "
            f"{max_staleness}: the learner violates its bound; stop the run",
        )
    if line.published <= line.version:
        yield Finding(
            Kind.HISTORY_ORDER, f"{where}: it published version {line.published}: restore the file from a backup"
        )
    if line.batch != len(line.trained):
        yield Finding(
            Kind.RECOUNT,
            f"{where}: the batch has {line.batch} trajectories, but {len(line.trained)} ids: restore the file",
        )
    counts = line.counts
    ended = counts["trained"] + counts["dropped"] + counts["dead_lettered"]
    if counts["offered"] != ended + counts["pending"] or min(counts.values()) < 0:
        yield Finding(
            Kind.SUMS,
            f"{where}: {counts['offered']} offered, but {ended} ended + {counts['pending']} pending: restore the file",
        )


def _check_tail(evidence: Evidence) -> Iterator[Finding]:
    """Yield a finding if there are lines after the checkpoint that a crash between checkpoints cannot leave."""
    checkpoint, tail = evidence.checkpoint, evidence.tail
    assert checkpoint is not None
    most = evidence.every * (1 + len(evidence.damaged))
    if not tail:
        return
    wrong = ""
    if tail[0].version < checkpoint.version:
        wrong = f"they begin at version {tail[0].version}, but the checkpoint is of version {checkpoint.version}"
    elif evidence.log.finished and not evidence.damaged:
        wrong = "the run had finished"
    elif len(tail) > most:
        wrong = f"a checkpoint follows every {count(evidence.every, 'version')}"
    if wrong:
        yield Finding(
            Kind.HISTORY_TAIL,
            f"history.jsonl has {count(len(tail), 'line')} after checkpoint {checkpoint.name} that no learner can have "
            f"written: {wrong}; remove them, or restore the file from a backup",
        )


def _check_sources(line: Line, counted: Recount, max_staleness: int, *, whole_log: bool) -> Iterator[Finding]:
    """Yield a finding if a trajectory of this line has no usable record on the log, or only one outside the bound."""
    for name in line.trained:
        records = [record for record in counted.arrivals.get(name, ()) if record.how == FINISHED and record.sound]
        if not records and whole_log:
            yield Finding(
                Kind.TRAINED_WITHOUT_RECORD,
                f"{name} is trained at version {line.version}, but the log has no usable record of it: the log lost "
                f"records, or the history belongs to another run; restore it",
            )
            return
        if records and not any(_is_within_bound(record, line.version, max_staleness) for record in records):
            first = records[0]
            yield Finding(
                Kind.STALENESS,
                f"{name} is trained at version {line.version}, but its tokens are of versions {first.oldest} to "
                f"{first.newest} (the bound is {max_staleness}): the learner violates its bound; stop it",
            )
            return


def _check_masked(line: Line, counted: Recount, max_staleness: int) -> Iterator[Finding]:
    """Yield a finding if the line masked another number of too old tokens than the records of its batch have."""
    sound = [[r for r in counted.arrivals.get(name, ()) if r.how == FINISHED and r.sound] for name in line.trained]
    if line.too_old is None or any(len(records) != 1 for records in sound):
        return  # not counted, or the log does not show which record was trained on
    lowest = line.version - max_staleness
    too_old = sum(tokens for (record,) in sound for version, tokens in record.tokens.items() if version < lowest)
    if too_old != line.too_old:
        yield Finding(
            Kind.RECOUNT,
            f"history.jsonl, the line of version {line.version}: {line.too_old} tokens were masked as older than "
            f"{max_staleness} versions, but the records of its batch have {too_old} such tokens: restore the file",
        )


def _is_within_bound(record: LoggedRecord, now: int, max_staleness: int) -> bool:
    """Whether a token is inside the bound, and no token is of a later version. Older tokens are masked."""
    return record.newest is None or now - max_staleness <= record.newest <= now


def _join_numbers(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
