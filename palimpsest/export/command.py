"""`palimpsest export ...`: what is asked, and the answer."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from palimpsest.common.text import count
from palimpsest.common.user_error import UserError
from palimpsest.services.report.named_run import named_run

PROGRAM = "palimpsest export"
USAGE = f"""\
usage: {PROGRAM} RUN [--version N] [--overwrite] FOLDER
       {PROGRAM} RUN.toml [--version N] [--overwrite] [--SECTION.KEY=VALUE ...] FOLDER

Writes a version of a run as an ordinary Hugging Face model: config, tokenizer and chat template of the starting model,
the version's weights as safetensors, and a model card. transformers and vLLM load the folder. Every tensor is checked
against its digest. It reads the run's store and needs no service, so it works while the run goes on, too.

  RUN              the run's folder (runs/ID)
  RUN.toml         describes the run, for one that was started by hand or is kept elsewhere; with --run.id=ID
  FOLDER           where the model goes: a folder that is empty or not there yet
  --version N      the version to export; without it, the last one published
  --overwrite      replace the exported model that is in FOLDER
  --model.path=... any key of the run, with RUN.toml: here, another copy of the starting model

A store in a bucket is read with the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_ACCESS_KEY and
MINIO_SECRET_KEY.

Exit codes: 0 done, 2 there is no such run or version, or FOLDER cannot be used, 3 the store does not answer or the disk
is full, 4 what the store holds is damaged, 130 stopped by Ctrl-C or SIGTERM; nothing half-written is left."""


@dataclass
class Request:
    """What the command line asks for."""

    run: list[str] = field(default_factory=list)
    """The run and its flags."""
    folder: Path = Path()
    version: int | None = None
    overwrite: bool = False


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Export what is asked for; the lines to print. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        yield USAGE
        return
    request = parse(arguments)
    config, home = named_run(request.run, environment, program=PROGRAM)
    from palimpsest.export.export import export

    with _interrupted_by_signals():
        done = export(config, home, request.folder, version=request.version, overwrite=request.overwrite)
    yield f"version {done.version} of run {done.run}: {count(done.tensors, 'tensor')}, {count(done.bytes, 'byte')}"
    yield f"digest: {done.digest}"
    yield f"model: {done.folder}"


def parse(arguments: Sequence[str]) -> Request:
    """The request in these words. Raises UserError."""
    request, named, flags = Request(), list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if argument == "--overwrite":
            request.overwrite = True
        elif name == "--version":
            request.version = _number(value if equals else waiting.pop(0) if waiting else "")
        elif argument.startswith("-") and "." not in name:
            raise UserError(f"{PROGRAM} {name}: there is no such flag\n{USAGE}")
        elif argument.startswith("-"):
            flags += [argument] if equals or not waiting else [argument, waiting.pop(0)]
        else:
            named.append(argument)
    if len(named) != 2:
        said = {0: "", 1: f"{named[0]} is the only name: a run and a folder are wanted\n\n" if named else ""}
        raise UserError(said.get(len(named), f"a run and a folder are wanted, not {' and '.join(named)}\n\n") + USAGE)
    request.run, request.folder = [named[0], *flags], Path(named[1])
    if flags and not named[0].endswith(".toml"):
        raise UserError(
            f"{flags[0]}: keys are set beside a run file: {PROGRAM} {Path(named[0]) / 'run.toml'} {flags[0]} ..."
        )
    return request


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt at once, so that what is half-written is removed.

    asyncio's own answer to Ctrl-C is lost where a coroutine ends without ever waiting, as those that read a disk do.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"--version {text}: the number of a version is wanted, for example --version 12")
    return int(text)
