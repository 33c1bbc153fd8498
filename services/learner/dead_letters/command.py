"""The command `palimpsest dead-letters`: parses its arguments and formats its output."""

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

list    print every record that could not be used, with its cause. The run may be running or stopped
replay  send such records to their topic again, unchanged, after their cause is fixed. A trajectory counts if its
        group is still open; otherwise it is skipped as a duplicate

  RUN.toml         configuration of the run; `palimpsest run` writes it to runs/ID/run.toml
  --cause=CAUSE    only records with this cause: {", ".join(list(RejectCause)[:5])},
                   {", ".join(list(RejectCause)[5:])}
  --offset=N       only the record with this dead letter; `list` shows the offsets
  --json           print JSON
  --again          also send records that were sent before
  --run.id=first   any configuration key of the run"""


@dataclass(frozen=True)
class Request:
    """The parsed command line."""

    action: str
    config: RunConfig
    causes: tuple[RejectCause, ...] = ()
    offsets: tuple[int, ...] = ()
    json: bool = False
    again: bool = False


@dataclass
class _Arguments:
    """The flags of this command, and the remaining arguments for the configuration."""

    values: dict[str, list[str]] = field(default_factory=lambda: {"cause": [], "offset": []})
    switches: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Run the command. Yield each line to print after its action is done. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        yield USAGE
        return
    request = _parse_request(arguments, environment)
    bus = open_existing_bus(request.config)
    try:
        buried, unreadable = read(bus, request.config.run.id)
        selected = chosen(buried, offsets=request.offsets, causes=request.causes)
        if missing := set(request.offsets) - {at.offset for one in buried for at in one.letters}:
            raise UserError(
                f"run {request.config.run.id} has no dead letter at offset {min(missing)}; `list` shows the offsets"
            )
        if request.action == "replay":
            for sent in replay(bus, selected, again=request.again):
                letter = sent.buried.letter
                yield (
                    f"dead letter {sent.buried.at.offset} ({letter.cause}): {len(letter.body)} bytes, key "
                    f"{_escape(letter.key)}, sent to {letter.topic}[{sent.to.partition}]@{sent.to.offset}"
                )
            yield _format_replayed(request, selected)
        elif request.json:
            yield msgspec.json.encode(_to_json(request.config.run.id, selected, unreadable)).decode()
        else:
            yield from _format_table(selected)
            yield from _format_summary(selected, unreadable)
    finally:
        bus.close()


def _parse_request(arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    action, *rest = arguments or [""]
    if action not in ("list", "replay"):
        raise UserError(USAGE)
    own = _split_arguments(rest)
    if not own.rest:
        raise UserError(USAGE)
    for switch, of in (("json", "list"), ("again", "replay")):
        if switch in own.switches and action != of:
            raise UserError(f"--{switch} belongs to `dead-letters {of}`, not to `dead-letters {action}`")
    config = load(own.rest, environment, program=f"{PROGRAM} {action}").config
    if not config.run.id:
        raise UserError("run.id is empty: set it, for example --run.id=first, or pass the run.toml of the run")
    return Request(
        action=action,
        config=config,
        causes=tuple(_parse_cause(text) for text in own.values["cause"]),
        offsets=tuple(_parse_offset(text) for text in own.values["offset"]),
        json="json" in own.switches,
        again="again" in own.switches,
    )


def _split_arguments(arguments: Sequence[str]) -> _Arguments:
    own, waiting = _Arguments(), list(arguments)
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


def _parse_cause(text: str) -> RejectCause:
    if text in list(RejectCause):
        return RejectCause(text)
    near = difflib.get_close_matches(text, list(RejectCause), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"causes: {', '.join(RejectCause)}"
    raise UserError(f"--cause={text}: unknown cause; {hint}")


def _parse_offset(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"--offset={text}: must be a whole number; `list` shows the offsets")
    return int(text)


def _format_table(buried: Sequence[Buried]) -> Iterator[str]:
    if not buried:
        return
    heads = ("offset", "when (UTC)", "record", "key", "bytes", "sent", "cause", "reason")
    rows = [
        (
            str(one.at.offset),
            _format_time(one.letter.buried_at),
            f"{one.letter.topic}[{one.letter.partition}]@{one.letter.offset}",
            _escape(one.letter.key),
            str(len(one.letter.body)),
            "yes" if one.replayed else "",
            one.letter.cause.value,
            _escape(one.letter.reason),
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


def _format_summary(buried: Sequence[Buried], unreadable: Sequence[Unreadable]) -> Iterator[str]:
    if buried:
        yield f"{_count(len(buried), 'record')}: {_count_by_cause(buried)}"
    else:
        yield "no dead letters"
    if unreadable:
        first = unreadable[0]
        yield (
            f"{_count(len(unreadable), 'record')} on {DEAD_LETTERS} cannot be read; another release may have written "
            f"them. The first is at offset {first.at.offset}: {_escape(first.reason)}"
        )


def _format_replayed(request: Request, selected: Sequence[Buried]) -> str:
    before = sum(bool(one.replayed) for one in selected)
    if not selected:
        return "nothing to send: no dead letter matches"
    if request.again or not before:
        return f"sent {_count(len(selected), 'record')}"
    skipped = f"{_count(before, 'record')} sent before; --again sends them again"
    new = len(selected) - before
    return f"sent {_count(new, 'record')}; skipped {skipped}" if new else f"nothing to send: {skipped}"


def _to_json(run: str, buried: Sequence[Buried], unreadable: Sequence[Unreadable]) -> dict[str, Any]:
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


def _count_by_cause(buried: Sequence[Buried]) -> str:
    counts = Counter(one.letter.cause.value for one in buried).most_common()
    return ", ".join(f"{count:,} {cause}" for cause, count in counts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_time(seconds: float) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # any program can write a letter, so the time may be out of range
        return "?"


def _escape(text: str) -> str:
    """Return the text on one line, with unprintable characters escaped: any program can write keys and reasons."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
