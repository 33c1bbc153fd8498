"""Compares the ledger in the checkpoint with the log: the offers and the ends of trajectories. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from palimpsest.common.messages import DEAD_LETTERS, TASKS, TRAJECTORIES, DropReason, group_id, trajectory_id
from palimpsest.services.audit.evidence import FINISHED, AuditedCheckpoint, Evidence, Finding, Kind, LoggedRecord, Offer
from palimpsest.services.audit.recount import Recount, trajectories
from palimpsest.services.learner.buffer.ledger import DEAD_LETTERED, TRAINED, LedgerState

BY_WORKERS = (DropReason.ENVIRONMENT_FAILED, DropReason.PROMPT_TOO_LONG, DropReason.ENGINE_FAILED)
"""Drop reasons that a worker publishes in a record."""
AFTER_ARRIVAL = (DropReason.OVER_STALENESS, DropReason.GROUP_TOO_SMALL, DropReason.EVEN_GROUP)
"""Drop reasons of the learner for trajectories that arrived."""


def recount(evidence: Evidence) -> Recount:
    """Recount the run's trajectories by id."""
    log, checkpoint = evidence.log, evidence.checkpoint
    known = len({offer.index for offer in log.offers}) if checkpoint is None else checkpoint.ledger.next_index
    offers: dict[str, Offer] = {}
    for offer in log.offers:
        if offer.index < known or checkpoint is None:
            offers.setdefault(offer.group, offer)
    open_groups = checkpoint.ledger.open_groups if checkpoint else {group: {} for group in offers}
    pending, ended = set[str](), dict[str, str]()
    for group, ends in open_groups.items():
        for sample in range(offers[group].samples if group in offers else evidence.samples):
            name = trajectory_id(group, sample)
            if sample in ends:
                ended[name] = ends[sample]
            else:
                pending.add(name)
    buried = frozenset((letter.partition, letter.offset) for letter in log.letters)
    arrivals: dict[str, list[LoggedRecord]] = {}
    for record in log.arrivals:
        if record.trajectory and (record.partition, record.offset) not in buried:
            arrivals.setdefault(record.trajectory, []).append(record)
    return Recount(
        offers=offers,
        offered=frozenset(trajectory_id(o.group, s) for o in offers.values() for s in range(o.samples)),
        trained=frozenset(name for line in evidence.lines for name in line.trained),
        pending=frozenset(pending),
        ended_open=ended,
        arrivals={name: tuple(records) for name, records in arrivals.items()},
        letters=frozenset(letter.trajectory for letter in log.letters if letter.trajectory),
        buried=buried,
    )


def pending_by_sums(ledger: LedgerState) -> int:
    """Return the number of pending trajectories by the ledger's sums."""
    return ledger.offered - ledger.trained - sum(ledger.dropped.values()) - ledger.dead_lettered


def judge_sums(evidence: Evidence, counted: Recount) -> Iterator[Finding]:
    """Yield findings where the ledger contradicts itself or the offers."""
    yield from _find_changed_tasks(evidence)
    if (checkpoint := evidence.checkpoint) is None:
        return
    ledger, name = checkpoint.ledger, checkpoint.name
    remedy = "the ledger was damaged or edited; continue from an older checkpoint or a backup"
    by_sums = pending_by_sums(ledger)
    if by_sums != len(counted.pending):
        yield Finding(
            Kind.SUMS,
            f"checkpoint {name}: {ledger.offered} offered - {ledger.trained} trained - {sum(ledger.dropped.values())} "
            f"dropped - {ledger.dead_lettered} dead-lettered leave {by_sums} pending, but the open groups hold "
            f"{len(counted.pending)}: {remedy}",
        )
    counts = {"offered": ledger.offered, "trained": ledger.trained, "dead_lettered": ledger.dead_lettered}
    for what, number in (counts | ledger.dropped).items():
        if number < 0:
            yield Finding(Kind.SUMS, f"checkpoint {name}: {what} is {number}; it must be at least 0: {remedy}")
    if evidence.log.cut(TASKS):
        return
    if missing := [i for i in range(ledger.next_index) if group_id(i) not in counted.offers]:
        yield Finding(
            Kind.RECOUNT,
            f"checkpoint {name} counts {ledger.next_index} groups as offered, but {len(missing)} of them are not on "
            f"the log, {group_id(missing[0])} first: the log lost records or belongs to another run; restore it",
        )
    elif ledger.offered != len(counted.offered):
        yield Finding(
            Kind.RECOUNT,
            f"checkpoint {name} counts {ledger.offered} trajectories as offered, the log holds {len(counted.offered)} "
            f"of the same {ledger.next_index} groups: {remedy}",
        )
    if unknown := sorted(set(ledger.open_groups) - counted.offers.keys() - set(map(group_id, missing))):
        yield Finding(
            Kind.RECOUNT, f"checkpoint {name} holds group {unknown[0]} open, which was never offered: {remedy}"
        )


def judge_ends(evidence: Evidence, counted: Recount) -> Iterator[Finding]:
    """Yield findings about ends in the ledger without a record, and about records that were read but have no end."""
    checkpoint, log = evidence.checkpoint, evidence.log
    if checkpoint is None:
        return
    if not log.cut(DEAD_LETTERS):
        yield from _find_missing_letters(checkpoint, counted, log.arrivals)
    if log.cut(TRAJECTORIES):
        return
    if not log.cut(TASKS):
        yield from _find_unresolved(checkpoint, counted)
        yield from _find_unexplained_ends(checkpoint, counted)
        if not log.cut(DEAD_LETTERS):
            yield from _find_ends_without_record(checkpoint, counted)
    if not log.cut(DEAD_LETTERS):
        yield from _find_unexplained_open_ends(checkpoint, counted)


def below(checkpoint: AuditedCheckpoint, record: LoggedRecord) -> bool:
    """Whether the record is below the checkpoint's offsets, so that a restart does not read it again."""
    return record.offset < checkpoint.offsets.get(record.partition, 0)


def _find_changed_tasks(evidence: Evidence) -> Iterator[Finding]:
    first: dict[str, Offer] = {}
    for offer in evidence.log.offers:
        earlier = first.setdefault(offer.group, offer)
        if offer.group != group_id(offer.index):
            yield Finding(
                Kind.TASK_CHANGED,
                f"group {offer.group} is offered as number {offer.index}, which is {group_id(offer.index)}: another "
                f"program writes to the run's topic of tasks; find it and stop it",
            )
        elif (earlier.task, earlier.samples) != (offer.task, offer.samples):
            yield Finding(
                Kind.TASK_CHANGED,
                f"group {offer.group} is offered twice with different tasks, {_task_text(earlier)} and "
                f"{_task_text(offer)}: the seed, the environments or the learner's release changed during the run; "
                f"restore their values",
            )


def _task_text(offer: Offer) -> str:
    return f"{offer.samples} of {offer.task[0]}/{offer.task[1]}"


def _find_missing_letters(
    checkpoint: AuditedCheckpoint, counted: Recount, arrivals: Iterable[LoggedRecord]
) -> Iterator[Finding]:
    counts, found = checkpoint.ledger.dead_lettered, len(counted.otherwise & counted.letters)
    if counts > found:
        yield Finding(
            Kind.LETTERS_MISSING,
            f"checkpoint {checkpoint.name} counts {trajectories(counts)} as dead-lettered, but dead letters name only "
            f"{found} of those it resolved: records were removed from {DEAD_LETTERS}; restore the log",
        )
    unusable = [
        record
        for record in arrivals
        if not (record.sound and record.trajectory)
        and below(checkpoint, record)
        and (record.partition, record.offset) not in counted.buried
    ]
    if unusable:
        at = unusable[0]
        yield Finding(
            Kind.LETTERS_MISSING,
            f"{len(unusable)} unusable records below the offsets of checkpoint {checkpoint.name} have no dead letter, "
            f"{TRAJECTORIES}[{at.partition}]@{at.offset} first: records were removed from {DEAD_LETTERS}; restore the "
            f"log",
        )


def _find_unresolved(checkpoint: AuditedCheckpoint, counted: Recount) -> Iterator[Finding]:
    lost = sorted(
        name
        for name, records in counted.arrivals.items()
        if (name in counted.pending or name not in counted.offered) and any(below(checkpoint, r) for r in records)
    )
    if lost:
        first = next(r for r in counted.arrivals[lost[0]] if below(checkpoint, r))
        yield Finding(
            Kind.UNRESOLVED,
            f"{trajectories(len(lost))} on the log below the offsets of checkpoint {checkpoint.name} have no end,"
            f" {lost[0]} first ({TRAJECTORIES}[{first.partition}]@{first.offset}): a restart does not read them again; "
            f"continue from an older checkpoint",
        )


def _find_unexplained_ends(checkpoint: AuditedCheckpoint, counted: Recount) -> Iterator[Finding]:
    """Compare sums over all groups, because a checkpoint counts closed groups without listing them."""
    dropped, ended = checkpoint.ledger.dropped, counted.otherwise
    ways = {name: {record.how for record in counted.arrivals.get(name, ())} for name in ended}
    for reason in BY_WORKERS:
        found = sum(reason.value in how for how in ways.values())
        if dropped.get(reason, 0) > found:
            yield _surplus_finding(checkpoint, dropped[reason], reason.value, f"only {found} such records")
    finished = sum(FINISHED in how for how in ways.values())
    if (counts := sum(dropped.get(reason, 0) for reason in AFTER_ARRIVAL)) > finished:
        yield _surplus_finding(checkpoint, counts, " or ".join(AFTER_ARRIVAL), f"only {finished} finished trajectories")


def _find_ends_without_record(checkpoint: AuditedCheckpoint, counted: Recount) -> Iterator[Finding]:
    silent = sorted(name for name in counted.otherwise - counted.letters if name not in counted.arrivals)
    deadline = checkpoint.ledger.dropped.get(DropReason.DEADLINE, 0)
    if len(silent) > deadline:
        yield Finding(
            Kind.UNEXPLAINED,
            f"{trajectories(len(silent))} resolved in checkpoint {checkpoint.name} without any record on the log, "
            f"{silent[0]} first, but only {deadline} were dropped at a deadline: the log lost records; restore it",
        )


def _surplus_finding(checkpoint: AuditedCheckpoint, counts: int, reason: str, found: str) -> Finding:
    return Finding(
        Kind.UNEXPLAINED,
        f"checkpoint {checkpoint.name} counts {counts} dropped as {reason}, the log holds {found}: the ledger was "
        f"edited or the log lost records; restore the damaged one",
    )


def _find_unexplained_open_ends(checkpoint: AuditedCheckpoint, counted: Recount) -> Iterator[Finding]:
    for name, how in sorted(counted.ended_open.items()):
        if not _is_explained(name, how, counted.arrivals, counted):
            yield Finding(
                Kind.UNEXPLAINED,
                f"checkpoint {checkpoint.name} has {name} as ended by {how}, but log and history have no record of "
                f"that end: the ledger was edited or the log lost records; restore the damaged one",
            )


def _is_explained(name: str, how: str, arrivals: Mapping[str, tuple[LoggedRecord, ...]], counted: Recount) -> bool:
    ways = Counter(record.how for record in arrivals.get(name, ()))
    if how == TRAINED:
        return name in counted.trained
    if how == DEAD_LETTERED:
        return name in counted.letters
    if how == DropReason.DEADLINE:
        return True
    return ways[FINISHED if how in AFTER_ARRIVAL else how] > 0
