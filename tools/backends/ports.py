"""Ports on 127.0.0.1 for servers that are killed and restarted."""

import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
CHOICE = range(20000, 32768)
"""Below the ephemeral ports of Linux. A client that retries the port of a dead server could otherwise get this port as
its own, connect to itself, and block the restart of the server."""


def is_free(port: int) -> bool:
    """Return whether a server can listen on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free(*others: int) -> int:
    """Return an unused port that is not in `others`."""
    return next(port for port in random.sample(CHOICE, len(CHOICE)) if port not in others and is_free(port))


def remembered(file: Path) -> int | None:
    """Return the port in this file, or None without the file."""
    return int(file.read_text()) if file.exists() else None
