"""history.jsonl: one line for each version trained, for the live view, the report and the summary.

A line is written before the checkpoint that counts it; the checkpoint holds the file's length, and a restart cuts the
file back to it, so that no version stands in it twice.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from common.files import named


class History:
    """Appends to one file."""

    def __init__(self, path: Path, *, length: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def add(self, line: dict[str, Any]) -> None:
        """One version's line."""
        with named(self._file.name):
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
