"""Passwords of the servers, one file for each folder. Only the owner can read it."""

import os
import secrets
from pathlib import Path


def kept(file: Path) -> str:
    """Return the password in this file. Creates the file if it is missing."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(16))
    except FileExistsError:
        pass
    return file.read_text()
