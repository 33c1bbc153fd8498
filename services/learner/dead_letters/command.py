"""`palimpsest dead-letters ...`: what is asked, and the answer in plain words."""

import datetime
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from palimpsest.common.bus.offline import open_existing_bus
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import DEAD_LETTERS
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.dead_letters.replay import Buried, Unreadable, chosen, read, replay

PROGRAM = "palimpsest dead-letters"
USAGE = f"""\
usage: {PROGRAM} list RUN.toml [--cause=CAUSE ...] [--offset=N ...] [--json] [--SECTION.KEY=VALUE ...]
       {PROGRAM} replay RUN.toml [--cause=CAUSE ...] [--offset=N ...] [--again] [--SECTION.KEY=VALUE ...]

list    every record that could not be used, with its cause; it works while the run goes on and when it is stopped
replay  send such records to their topic again, as they were, for readers to take up: once what was in their way is
        mended. A trajectory counts if its group is still open; later it is passed over as a duplicate

  RUN.toml         describes the run; a run of `palimpsest run` has its own in runs/ID/run.toml
  --cause=CAUSE    only these: {", ".join(list(RejectCause)[:5])},
                   {", ".join(list(RejectCause)[5:])}
  --offset=N       only the record with this dead letter: the number that `list` shows
  --json           for machines
  --again          also what was sent before
  --run.id=first   any key of the run"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    action: str
    config: RunConfig
    causes: tuple[RejectCause, ...] = ()
    offsets: tuple[int, ...] = ()
    json: bool = False
    again: bool = False


@dataclass
class _Own:
    """The flags that are ours, and what is left for the run."""

    values: dict[str, list[str]] = field(default_factory=lambda: {"cause": [], "offset": []})
    switches: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Do what is asked; the lines to print, each when it has come true. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        yield USAGE
        return
    request = _request(arguments, environment)
    bus = open_existing_bus(request.config)
    try:
        buried, unreadable = read(bus, request.config.run.id)
        some = chosen(buried, offsets=request.offsets, causes=request.causes)
        if missing := set(request.offsets) - {at.offset for one in buried for at in one.letters}:
            raise UserError(f"run {request.config.run.id} has no dead letter {min(missing)}; `list` shows those it has")
        if request.action == "replay":
            for sent in replay(bus, some, again=request.again):
                letter = sent.buried.letter
                yield (
                    f"dead letter {sent.buried.at.offset} ({letter.cause}): {len(letter.body)} bytes, key "
                    f"{_plain(letter.key)}, sent to {letter.topic}[{sent.to.partition}]@{sent.to.offset}"
                )
            yield _replayed(request, some)
        elif request.json:
            yield msgspec.json.encode(_for_machines(request.config.run.id, some, unreadable)).decode()
        else:
            yield from _table(some)
            yield from _summary(some, unreadable)
    finally:
        bus.close()


def _request(arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    action, *rest = arguments or [""]
    if action not in ("list", "replay"):
        raise UserError(USAGE)
    own = _split(rest)
    if not own.rest:
        raise UserError(USAGE)
    for switch, of in (("json", "list"), ("again", "replay")):
        if switch in own.switches and action != of:
            raise UserError(f"--{switch} belongs to `dead-letters {of}`, not to `dead-letters {action}`")
    config = load(own.rest, environment, program=f"{PROGRAM} {action}").config
    if not config.run.id:
        raise UserError("run.id is empty: name the run that is meant, for example --run.id=first, or give its run.toml")
    return Request(
        action=action,
        config=config,
        causes=tuple(_cause(text) for text in own.values["cause"]),
        offsets=tuple(_offset(text) for text in own.values["offset"]),
        json="json" in own.switches,
        again="again" in own.switches,
    )


def _split(arguments: Sequence[str]) -> _Own:
    own, waiting = _Own(), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("--json", "--again"):
            own.switches.add(name)
        elif argument.startswith("--") and name in own.values:
            if not equals and not waiting:
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
            own.values[name].append(value if equals else waiting.pop(0))
        else:
            own.rest.append(argument)
    return own


def _cause(text: str) -> RejectCause:
    if text in list(RejectCause):
        return RejectCause(text)
    near = difflib.get_close_matches(text, list(RejectCause), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RejectCause)}"
    raise UserError(f"--cause={text}: there is no such cause; {hint}")


def _offset(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"--offset={text}: a whole number is wanted, as `list` shows it")
    return int(text)


def _table(buried: Sequence[Buried]) -> Iterator[str]:
    if not buried:
        return
    heads = ("offset", "when (UTC)", "record", "key", "bytes", "sent", "cause", "reason")
    rows = [
        (
            str(one.at.offset),
            _when(one.letter.buried_at),
            f"{one.letter.topic}[{one.letter.partition}]@{one.letter.offset}",
            _plain(one.letter.key),
            str(len(one.letter.body)),
            "yes" if one.replayed else "",
            one.letter.cause.value,
            _plain(one.letter.reason),
        )
        for one in buried
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [
            cell.rjust(width) if head in ("offset", "bytes") else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()
    yield ""


def _summary(buried: Sequence[Buried], unreadable: Sequence[Unreadable]) -> Iterator[str]:
    if buried:
        yield f"{_count(len(buried), 'record')}: {_by_cause(buried)}"
    else:
        yield "no dead letters"
    if unreadable:
        first = unreadable[0]
        yield (
            f"{_count(len(unreadable), 'record')} on {DEAD_LETTERS} cannot be read, of another release perhaps; the "
            f"first at offset {first.at.offset}: {_plain(first.reason)}"
        )


def _replayed(request: Request, some: Sequence[Buried]) -> str:
    before = sum(bool(one.replayed) for one in some)
    if not some:
        return "nothing to send: there is no such dead letter"
    if request.again or not before:
        return f"sent {_count(len(some), 'record')}"
    kept = f"{_count(before, 'record')} had been sent before; --again sends such once more"
    return f"sent {_count(len(some) - before, 'record')}; {kept}" if before < len(some) else f"nothing to send: {kept}"


def _for_machines(run: str, buried: Sequence[Buried], unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    return {
        "run": run,
        "records": [
            {
                "offset": one.at.offset,
                "letters": [at.offset for at in one.letters],
                "buried_at": one.letter.buried_at,
                "topic": one.letter.topic,
                "position": {"partition": one.letter.partition, "offset": one.letter.offset},
                "key": one.letter.key,
                "headers": one.letter.headers,
                "cause": one.letter.cause,
                "reason": one.letter.reason,
                "bytes": len(one.letter.body),
                "replayed": [{"partition": at.partition, "offset": at.offset} for at in one.replayed],
            }
            for one in buried
        ],
        "causes": Counter(one.letter.cause.value for one in buried),
        "unreadable": [{"offset": one.at.offset, "reason": one.reason} for one in unreadable],
    }


def _by_cause(buried: Sequence[Buried]) -> str:
    counts = Counter(one.letter.cause.value for one in buried).most_common()
    return ", ".join(f"{count:,} {cause}" for cause, count in counts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _when(seconds: float) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # a letter by anyone, too
        return "?"


def _plain(text: str) -> str:
    """On one line, whatever it holds: keys and reasons come from anywhere."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
