"""Lists the dead letters of a run, and sends their records again.

A reader writes a dead letter each time it reads an unusable record, so a record can have several letters. Letters of
the same position on the log are merged, and the offset of the first letter identifies the record.

A record is sent again with its original bytes (of a long record: read from the log again, because its letter does not
hold them), key and headers, and a header `replayed` that names the letter. Only
these headers show which records were sent again. The record and this mark are one record on the log, so no crash can
separate them. The key is the original one, so a record that was sent again is in the same partition at a later offset,
and the search starts there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from palimpsest.common.bus.claim_check import LOST
from palimpsest.common.bus.decoding import OMITTED
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Position, Record
from palimpsest.common.messages import DEAD_LETTERS, REPLAYED, TOPICS, DeadLetter, Undecodable, decode
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Buried:
    """A record that could not be used."""

    letter: DeadLetter
    """The first dead letter of the record."""
    at: Position
    """Position of that letter. Its offset identifies the record."""
    again: tuple[Position, ...] = ()
    """Positions of later letters of the same record."""
    replayed: tuple[Position, ...] = ()
    """Positions on its topic at which the record was sent again."""

    @property
    def letters(self) -> tuple[Position, ...]:
        """Positions of all letters of the record, the first letter first."""
        return (self.at, *self.again)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record on `dead_letters` that is no letter of a record: it cannot be decoded, or names no topic of a run."""

    at: Position
    reason: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A record that was sent again, and its new position."""

    buried: Buried
    to: Position


def read(bus: Bus, run: str) -> tuple[list[Buried], list[Unreadable]]:
    """Return the run's buried records, oldest letter first, and the records on `dead_letters` that are no letter of
    a record."""
    found: dict[tuple[str, int, int], Buried] = {}
    unreadable = []
    for record in read_existing(bus, DEAD_LETTERS):
        at = Position(record.partition, record.offset)
        try:
            letter: DeadLetter = decode(DEAD_LETTERS, record.body)
        except Undecodable as error:
            unreadable.append(Unreadable(at, str(error)))
            continue
        if letter.run != run:
            continue
        if letter.topic not in TOPICS:
            unreadable.append(Unreadable(at, f"it names a record of topic {letter.topic[:80]!r}, which no run has"))
            continue
        place = (letter.topic, letter.partition, letter.offset)
        first = found.get(place)
        found[place] = Buried(letter, at) if first is None else replace(first, again=(*first.again, at))
    return _with_replays(bus, list(found.values())), unreadable


def chosen(buried: Iterable[Buried], *, offsets: Iterable[int], causes: Iterable[RejectCause]) -> list[Buried]:
    """Return the records with one of these letters and one of these causes. An empty filter matches every record."""
    offsets, causes = set(offsets), set(causes)
    return [
        one
        for one in buried
        if (not offsets or offsets & {at.offset for at in one.letters}) and (not causes or one.letter.cause in causes)
    ]


def replay(bus: Bus, buried: Sequence[Buried], *, again: bool) -> Iterator[Sent]:
    """Send the records again; skip records that were sent before unless `again`. Yield each one when it is durable."""
    for one in buried:
        if one.replayed and not again:
            continue
        original = _original(bus, one.letter)
        headers = {name: value for name, value in original.headers.items() if name not in (LOST, OMITTED)}
        record = Outgoing(original.key, original.body, headers | {REPLAYED: _letter_name(one.at)})
        (to,) = bus.publish(one.letter.topic, [record])
        yield Sent(one, to)


def _original(bus: Bus, letter: DeadLetter) -> Record:
    """Return the original record. Raises UserError if it is not in the letter and gone from the log."""
    if OMITTED not in letter.headers:
        return Record(letter.topic, letter.partition, letter.offset, letter.key, letter.body, letter.headers)
    for record in read_existing(bus, letter.topic, {letter.partition: letter.offset}):
        if (record.partition, record.offset) == (letter.partition, letter.offset):
            return record
    raise UserError(
        f"the record {letter.topic}[{letter.partition}]@{letter.offset} is gone from the log, and its dead letter does "
        f"not hold its {letter.headers[OMITTED]} bytes: it cannot be sent again",
        ExitCode.DAMAGED,
    )


def _with_replays(bus: Bus, buried: list[Buried]) -> list[Buried]:
    """Return the records with `replayed` filled from the log."""
    sent: dict[tuple[str, str], list[Position]] = {}
    for topic in dict.fromkeys(one.letter.topic for one in buried):
        starts: dict[int, int] = {}
        for letter in (one.letter for one in buried if one.letter.topic == topic):
            starts[letter.partition] = min(starts.get(letter.partition, letter.offset + 1), letter.offset + 1)
        for record in read_existing(bus, topic, starts):
            if (name := record.headers.get(REPLAYED)) is not None:
                sent.setdefault((topic, name), []).append(Position(record.partition, record.offset))
    return [
        replace(
            one, replayed=tuple(to for at in one.letters for to in sent.get((one.letter.topic, _letter_name(at)), ()))
        )
        for one in buried
    ]


def _letter_name(at: Position) -> str:
    return f"{at.partition}/{at.offset}"
