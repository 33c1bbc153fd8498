"""`palimpsest store` and `palimpsest pin`: the stored versions of a run."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from palimpsest.common.files import is_special
from palimpsest.common.program import print_line
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.text import count
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.control_client import ControlClient, url_in
from palimpsest.export.archive import read_archive, write_archive
from palimpsest.export.stored_version import NotStored, StoredVersions
from palimpsest.services.report.named_run import named_run

USAGE = """\
usage: palimpsest store ls RUN
       palimpsest store show RUN VERSION
       palimpsest store verify RUN [VERSION]
       palimpsest store export RUN VERSION FILE
       palimpsest store import RUN FILE

  ls        list the versions: how each is stored, its parent, its bytes and its pins
  show      print a version: its digest, its chain down to the base, and its tensors
  verify    rebuild a version, or all of them, and compare every digest; exits with 4 if one is damaged
  export    write a version and those on which it depends to a tar file
  import    add the versions of such a file to the store of the run, which must not be running

  RUN       the run's folder (runs/ID), or RUN.toml and its flags

The commands read the storage directly, so they work with or without running services. `palimpsest export` writes a
version as a model."""
PIN = """\
usage: palimpsest pin RUN VERSION [--name=NAME] [--hours=N]
       palimpsest pin RUN VERSION [--name=NAME] --release

Keep a version of a running run, with those on which it depends, until it is released or for N hours. It needs the role
`operate` (PALIMPSEST_TOKEN) if the store has tokens.

  RUN       the run's folder (runs/ID), or the address of the store (http://...)
  --name    of the pin (default: operator); a version may have several"""


def store(arguments: Sequence[str]) -> None:
    """Run `palimpsest store`. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        print_line(USAGE)
        return
    takes = {"ls": 0, "show": 1, "verify": (0, 1), "export": 2, "import": 1}
    words = [word for word in arguments if not word.startswith("-")]
    flags = [word for word in arguments if word.startswith("-")]
    if unknown := [flag for flag in flags if "." not in flag.partition("=")[0]]:
        raise UserError(f"palimpsest store {unknown[0]}: there is no such flag\n{USAGE}")
    wanted = takes.get(words[0]) if words else None
    numbers = wanted if isinstance(wanted, tuple) else (wanted,)
    if len(words) < 2 or len(words) - 2 not in numbers:
        raise UserError(USAGE)
    kind, run, rest = words[0], [words[1], *flags], words[2:]
    config, _home = named_run(run, os.environ, program="palimpsest store")
    with StoredVersions(config) as stored:
        match kind:
            case "ls":
                lines = _listed(stored)
            case "show":
                lines = _shown(stored, _number(rest[0]))
            case "verify":
                lines = _verified(stored, [_number(rest[0])] if rest else stored.numbers())
            case "export":
                written = write_archive(stored, _number(rest[0]), Path(rest[1]))
                if is_special(Path(rest[1])):  # the standard output holds the archive, perhaps
                    sys.stderr.write(f"{written}\n")
                    return
                lines = iter([written])
            case _:
                lines = iter([read_archive(stored, Path(rest[0]))])
        for line in lines:
            print_line(line)


def pin(arguments: Sequence[str]) -> None:
    """Run `palimpsest pin`. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        print_line(PIN)
        return
    words = [word for word in arguments if not word.startswith("-")]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("-"))
    if unknown := set(flags) - {"name", "hours", "release"}:
        raise UserError(f"palimpsest pin --{min(unknown)}: there is no such flag\n{PIN}")
    if len(words) != 2:
        raise UserError(PIN)
    version, name = _number(words[1]), flags.get("name") or "operator"
    client = ControlClient(words[0] if "://" in words[0] else url_in(Path(words[0]), "snapshot_store"))
    try:
        if "release" in flags:
            client.send("DELETE", f"/v1/pins/{version}", params={"name": name})
            print_line(f"version {version}: pin {name} released")
            return
        seconds = 3600 * _hours(flags["hours"]) if "hours" in flags else None
        client.send("PUT", f"/v1/pins/{version}", json={"name": name, "seconds": seconds})
    finally:
        client.close()
    until = f"for {flags['hours']} hours" if seconds else "until it is released"
    print_line(f"version {version}: pinned as {name} {until}")


def _listed(stored: StoredVersions) -> Iterator[str]:
    total, pins, damaged = 0, stored.pins(), list[int]()
    numbers = stored.numbers()
    for number in numbers:
        try:
            manifest = stored.manifest(number)
        except NotStored:
            continue  # the running store has removed it meanwhile
        except UserError as error:
            if error.code is not ExitCode.DAMAGED:
                raise
            damaged.append(number)
            yield f"{number:8}  DAMAGED: {error}"
            continue
        total += manifest.object_size
        pinned = f"  pinned: {', '.join(pins[Version(number)])}" if Version(number) in pins else ""
        size = f"{manifest.object_size:>14,} bytes"
        yield f"{number:8}  {manifest.digest[:12]}  {_stored_as(manifest):20}  {size}{pinned}"
    yield f"{count(len(numbers), 'version')}, {count(total, 'byte')}"
    _refuse(damaged)


def _shown(stored: StoredVersions, version: int) -> Iterator[str]:
    manifest = stored.manifest(version)
    yield f"version {version} of run {manifest.run}, stored by writer {manifest.writer}"
    yield f"digest   {manifest.digest}"
    for each in manifest.objects:
        yield f"object   {each.digest}, {count(each.size, 'byte')}"
    yield f"size     {count(manifest.object_size, 'byte')} for {count(manifest.full_size, 'byte')} of weights"
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(manifest.encodings.items()))
    yield f"stored   {_stored_as(manifest)}{f' ({kinds})' if kinds else ''}"
    chain = [manifest]
    with stored.whole_chain(version):
        while (parent := chain[-1].parent) is not None:
            chain.append(stored.manifest(parent.version))
    size = sum(each.object_size for each in chain)
    yield f"chain    {' <- '.join(str(each.version) for each in chain)}: {count(size, 'byte')}"
    for entry in manifest.tensors:
        yield f"  {entry.name}  {entry.dtype} {list(entry.shape)}  {entry.length:,} of {entry.size:,} bytes"


def _verified(stored: StoredVersions, versions: Sequence[int]) -> Iterator[str]:
    """Rebuild versions one after another in one temporary file. Raises UserError if one is damaged."""
    damaged = list[int]()
    if not versions:
        stored.manifest(None)  # says that there is none, and where
    with tempfile.TemporaryDirectory(prefix="palimpsest-verify-") as folder:
        walker = Walker(stored, RawFile(Path(folder) / "weights.raw"))
        for version in versions:
            try:
                with stored.user_errors(f"version {version}"), stored.whole_chain(version):
                    walker.move(stored.manifest(version).version)
            except UserError as error:
                if error.code is not ExitCode.DAMAGED:
                    raise
                damaged.append(version)
                yield f"version {version}: DAMAGED: {error}"
            else:
                yield f"version {version}: every digest is right"
    _refuse(damaged)


def _refuse(damaged: Sequence[int]) -> None:
    if damaged:
        raise UserError(f"{count(len(damaged), 'version')} damaged: {', '.join(map(str, damaged))}", ExitCode.DAMAGED)


def _stored_as(manifest: Manifest) -> str:
    return f"delta to {manifest.parent.version}" if manifest.parent is not None else "in full"


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise UserError(f"{text!r} is not a version: give its number")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 1e6:
        raise UserError(f"--hours={text}: give a number of hours above 0")
    return hours
