"""Command line of `palimpsest export`."""

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
usage: {PROGRAM} RUN [--version N] [--adapter] [--overwrite] FOLDER
       {PROGRAM} RUN.toml [--version N] [--adapter] [--overwrite] [--SECTION.KEY=VALUE ...] FOLDER

Write a version of a run as a Hugging Face model: config, tokenizer and chat template of the starting model, the weights
of the version as safetensors, and a model card. transformers and vLLM load the folder. Every tensor is checked against
its digest. The command reads the store directly, so it works with or without running services.

  RUN              the run's folder (runs/ID)
  RUN.toml         the configuration of a run without such a folder; pass --run.id=ID as well
  FOLDER           the new folder of the model; if it exists, it must be empty
  --version N      the version to export (default: the newest)
  --adapter        of a run with learner.lora: write the adapter alone, as peft loads it (default: merged)
  --overwrite      replace the exported model in FOLDER
  --model.path=... with RUN.toml, sets any key of the run; this key names another copy of the starting model

A store in a bucket is read with the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_ACCESS_KEY and
MINIO_SECRET_KEY.

Exit codes: 0 done, 2 unknown run or version, or unusable FOLDER, 3 the store does not answer or the disk is full, 4 the
stored version is damaged, 130 stopped by Ctrl-C or SIGTERM. After an error FOLDER is unchanged."""


@dataclass
class Request:
    """A parsed command line."""

    run: list[str] = field(default_factory=list)
    """The run and its configuration flags."""
    folder: Path = Path()
    version: int | None = None
    overwrite: bool = False
    adapter: bool = False


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Export a version. Yields the lines to print. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        yield USAGE
        return
    request = parse(arguments)
    config, home = named_run(request.run, environment, program=PROGRAM)
    from palimpsest.export.export import export

    with _interrupted_by_signals():
        done = export(
            config,
            home,
            request.folder,
            version=request.version,
            overwrite=request.overwrite,
            alone=request.adapter,
        )
    yield f"version {done.version} of run {done.run}: {count(done.tensors, 'tensor')}, {count(done.bytes, 'byte')}"
    yield f"digest: {done.digest}"
    yield f"model: {done.folder}"


def parse(arguments: Sequence[str]) -> Request:
    """Parse the command line. Raises UserError."""
    request, named, flags = Request(), list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if argument == "--overwrite":
            request.overwrite = True
        elif argument == "--adapter":
            request.adapter = True
        elif name == "--version":
            request.version = _number(value if equals else waiting.pop(0) if waiting else "")
        elif argument.startswith("-") and "." not in name:
            raise UserError(f"{PROGRAM} {name}: there is no such flag\n{USAGE}")
        elif argument.startswith("-"):
            flags += [argument] if equals or not waiting else [argument, waiting.pop(0)]
        else:
            named.append(argument)
    if len(named) != 2:
        got = f"{PROGRAM} takes a run and a folder; got: {' '.join(named)}\n\n" if named else ""
        raise UserError(got + USAGE)
    request.run, request.folder = [named[0], *flags], Path(named[1])
    if flags and not named[0].endswith(".toml"):
        raise UserError(
            f"{flags[0]}: a configuration key needs a run file: {PROGRAM} {Path(named[0]) / 'run.toml'} {flags[0]} ..."
        )
    return request


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and SIGTERM, so that cleanup removes partial files.

    The handler of asyncio loses Ctrl-C if a coroutine ends without waiting, as coroutines that read a disk do.
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
        raise UserError(f"--version {text}: must be a version number, for example --version 12")
    return int(text)
