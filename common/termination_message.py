"""The message that Kubernetes shows for an ended container."""

import contextlib
from pathlib import Path

FILE = Path("/dev/termination-log")
"""Kubernetes mounts it into every container (`terminationMessagePath`) and reads it when the container ends."""
LIMIT_BYTES = 4096
"""Kubernetes cuts longer messages."""


def leave_message(text: str) -> None:
    """Write why the process ends into the file. Without the file, which only Kubernetes makes, this has no effect."""
    if FILE.is_file():
        with contextlib.suppress(OSError):  # the message must not hide the error
            FILE.write_bytes(text.encode()[:LIMIT_BYTES])
