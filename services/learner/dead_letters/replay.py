"""The dead letters of a run: listed, and sent again.

A record is buried anew whenever its reader comes upon it again, so what counts is the record: the letters of one
position on the log are one, and the first of them names it.

Sent again means the original bytes under the original key and headers, with a header `replayed` that names the letter.
What has been sent is known from these headers alone. The record and the note that it was sent are one record on the
log: no crash can come between them, and there is no second account to disagree with. The key is the original's, so a
record sent again stands in the same partition behind it, and the search begins there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from palimpsest.common.bus.claim_check import LOST
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing, Position
from palimpsest.common.messages import DEAD_LETTERS, REPLAYED, DeadLetter, Undecodable, decode
from palimpsest.common.rejected_record import RejectCause


@dataclass(frozen=True, slots=True)
class Buried:
    """A record that could not be used."""

    letter: DeadLetter
    """The first that was written of it."""
    at: Position
    """Where that letter stands: its number is the offset."""
    again: tuple[Position, ...] = ()
    """Where later letters of the same record stand."""
    replayed: tuple[Position, ...] = ()
    """Where the record stands again on its topic, if it was sent again."""

    @property
    def letters(self) -> tuple[Position, ...]:
        """All of them, the first first."""
        return (self.at, *self.again)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record on `dead_letters` that is none."""

    at: Position
    reason: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A record that was sent again."""

    buried: Buried
    to: Position


def read(bus: Bus, run: str) -> tuple[list[Buried], list[Unreadable]]:
    """The run's buried records, the oldest letter first, and what on `dead_letters` cannot be read itself."""
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
        place = (letter.topic, letter.partition, letter.offset)
        first = found.get(place)
        found[place] = Buried(letter, at) if first is None else replace(first, again=(*first.again, at))
    return _with_replays(bus, list(found.values())), unreadable


def chosen(buried: Iterable[Buried], *, offsets: Iterable[int], causes: Iterable[RejectCause]) -> list[Buried]:
    """Those with one of these letters and one of these causes; none named: any."""
    offsets, causes = set(offsets), set(causes)
    return [
        one
        for one in buried
        if (not offsets or offsets & {at.offset for at in one.letters}) and (not causes or one.letter.cause in causes)
    ]


def replay(bus: Bus, buried: Sequence[Buried], *, again: bool) -> Iterator[Sent]:
    """Send them again, those sent before only when `again`; each is durable when it comes."""
    for one in buried:
        if one.replayed and not again:
            continue
        letter = one.letter
        headers = {name: value for name, value in letter.headers.items() if name != LOST}  # that was added on reading
        record = Outgoing(letter.key, letter.body, headers | {REPLAYED: _name(one.at)})
        (to,) = bus.publish(letter.topic, [record])
        yield Sent(one, to)


def _with_replays(bus: Bus, buried: list[Buried]) -> list[Buried]:
    """The same, and where each was sent again."""
    sent: dict[tuple[str, str], list[Position]] = {}
    for topic in dict.fromkeys(one.letter.topic for one in buried):
        behind: dict[int, int] = {}
        for letter in (one.letter for one in buried if one.letter.topic == topic):
            behind[letter.partition] = min(behind.get(letter.partition, letter.offset + 1), letter.offset + 1)
        for record in read_existing(bus, topic, behind):
            if (name := record.headers.get(REPLAYED)) is not None:
                sent.setdefault((topic, name), []).append(Position(record.partition, record.offset))
    return [
        replace(one, replayed=tuple(to for at in one.letters for to in sent.get((one.letter.topic, _name(at)), ())))
        for one in buried
    ]


def _name(at: Position) -> str:
    return f"{at.partition}/{at.offset}"
