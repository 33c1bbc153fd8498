"""Keeps what an engine writes while it starts and ends off the terminal, unless the command fails.

vLLM, its libraries and its processes write warnings and progress bars to standard error. A person who waits for a table
needs them only if there is no table.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


class HeldOutput:
    """Text that was written to standard error. It comes out when the context ends with an exception."""

    def __enter__(self) -> "HeldOutput":
        self._file = tempfile.TemporaryFile()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if failed is not None:
                self._file.seek(0)
                sys.stderr.write(self._file.read().decode(errors="replace"))
                sys.stderr.flush()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold what this process writes in this context, and what processes that start in it write at any time."""
        sys.stderr.flush()
        terminal = os.dup(STDERR)
        os.dup2(self._file.fileno(), STDERR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, STDERR)
            os.close(terminal)
