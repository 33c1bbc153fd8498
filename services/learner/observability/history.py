"""history.jsonl: one line for each version trained, for the live view, the report and the summary.

A line is written before the checkpoint that counts it. The checkpoint holds the file's length, and a restart truncates
the history to that length, so that it holds each version once. The restart writes the truncated history to a new file:
a learner that was paused and replaced still appends to the old one, which no program reads.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from palimpsest.common.files import with_filename, write
from palimpsest.common.user_error import ExitCode, UserError

NEWEST = 1000
"""Number of lines that a follower gets when the history is opened."""


class HistoryFollower(Protocol):
    """Gets the lines of the history. The loop's thread calls it, so it must neither wait nor raise."""

    def begin(self, newest: Sequence[Mapping[str, Any]]) -> None:
        """The history is open and ends with these lines, at most NEWEST."""

    def add(self, line: Mapping[str, Any]) -> None:
        """This line was appended and is durable."""


class History:
    """Appends to one file, truncated to `length` bytes. Raises UserError if the file holds fewer bytes."""

    def __init__(self, path: Path, *, length: int, followers: Sequence[HistoryFollower] = ()) -> None:
        kept = _first(path, length)
        write(path, kept)
        self._file = path.open("ab")
        self._followers = followers
        newest = _newest(kept) if followers else []
        for follower in followers:
            follower.begin(newest)

    def add(self, line: dict[str, Any]) -> None:
        """Append the line of one version. It is durable when this returns."""
        with with_filename(self._file.name):
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        for follower in self._followers:
            follower.add(line)

    @property
    def length(self) -> int:
        """Length of the file in bytes."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _first(path: Path, length: int) -> bytes:
    """Return the first `length` bytes of the file."""
    counted = path.read_bytes()[:length] if path.exists() else b""
    if len(counted) < length:
        raise UserError(
            f"{path} holds {len(counted)} bytes, but the checkpoint counts {length}. Restore the file from a copy, or "
            f"start a new run",
            ExitCode.DAMAGED,
        )
    return counted


def _newest(body: bytes) -> list[dict[str, Any]]:
    """Return the newest lines; none if one of them cannot be read, which the report and the audit show."""
    try:
        return [msgspec.json.decode(line) for line in body.splitlines()[-NEWEST:]]
    except msgspec.DecodeError:
        return []
