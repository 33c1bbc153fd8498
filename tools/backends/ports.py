"""Ports of 127.0.0.1 for servers that are killed and come back."""

import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
CHOICE = range(20000, 32768)
"""Below those that Linux lends to clients: one that keeps trying a dead server's port could else be lent that very
port, connect to itself, and keep the server from coming back."""


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free(*others: int) -> int:
    """A port that no one listens on, and none of the others."""
    return next(port for port in random.sample(CHOICE, len(CHOICE)) if port not in others and is_free(port))


def remembered(file: Path) -> int | None:
    """The port that this file keeps, if it is there."""
    return int(file.read_text()) if file.exists() else None
