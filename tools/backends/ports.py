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


def free() -> int:
    """A port that no one listens on."""
    return next(port for port in random.sample(CHOICE, len(CHOICE)) if is_free(port))


def kept(file: Path, wanted: int | None) -> int:
    """The wanted port, else the one that this file remembers, else a free one; the file remembers it from now on."""
    port = wanted or (int(file.read_text()) if file.exists() else free())
    file.write_text(f"{port}\n")
    return port
