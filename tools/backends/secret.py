"""Passwords of the servers: made once for a folder, readable by its owner only."""

import os
import secrets
from pathlib import Path


def kept(file: Path) -> str:
    """The password in this file, made if there is none."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(16))
    except FileExistsError:
        pass
    return file.read_text()
