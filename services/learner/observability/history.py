"""history.jsonl: one line for each version trained, for the live view, the report and the summary.

A line is written before the checkpoint that counts it; the checkpoint holds the file's length, and a restart goes on
from a copy of that length, so that no version stands in it twice. A copy and not the file itself: a learner that was
paused and replaced goes on appending to the file it has open, and nobody reads that one any more.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common.files import with_filename, write
from palimpsest.common.user_error import ExitCode, UserError


class History:
    """Appends to one file. Raises UserError when the file holds less than `length` bytes."""

    def __init__(self, path: Path, *, length: int) -> None:
        counted = _first(path, length)
        write(path, counted)
        self._file = path.open("ab")

    def add(self, line: dict[str, Any]) -> None:
        """One version's line."""
        with with_filename(self._file.name):
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _first(path: Path, length: int) -> bytes:
    """The file's first `length` bytes."""
    counted = path.read_bytes()[:length] if path.exists() else b""
    if len(counted) < length:
        raise UserError(
            f"{path} holds {len(counted)} bytes, the checkpoint counts {length}: restore the file from a copy, or "
            f"start a new run",
            ExitCode.DAMAGED,
        )
    return counted
