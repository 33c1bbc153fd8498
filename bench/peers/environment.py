"""An environment of its own for the peer: outside the checkout, keyed by its packages, made when it is first needed."""

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tools.pip_settings import client_settings

ROOT = Path(__file__).resolve().parents[2]
TRL = "1.16.0"
SAME = ("torch", "transformers", "numpy", "msgspec", "structlog", "prometheus-client", "pydantic")
"""Packages that the peer gets in the version of the project: the model and the tasks are then the same code."""


def interpreter(folder: Path, trl: str) -> Path:
    """Return the Python of an environment below `folder` with this TRL, and make it if it does not exist.

    The packages come from the registry that pip is configured for. Raises CalledProcessError if they cannot be had.
    """
    packages = [f"trl=={trl}", *(f"{name}=={importlib.metadata.version(name)}" for name in SAME)]
    key = hashlib.blake2b(" ".join([*packages, sys.version]).encode(), digest_size=4).hexdigest()
    home = folder / f"trl-{trl}-{key}"
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        tools = Path(sys.executable).parent
        settings = client_settings(tools / "pip") | {"UV_COMPILE_BYTECODE": "0"}
        print(f"making {home}", file=sys.stderr)
        uv = str(tools / "uv")
        subprocess.run([uv, "venv", "--clear", "--python", sys.executable, str(home)], check=True, env=settings)
        subprocess.run([uv, "pip", "install", "--python", str(python), *packages], check=True, env=settings)
        ready.touch()
    return python
