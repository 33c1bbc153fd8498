"""Programs that a benchmark of the gateway starts, and the address at which one answers."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

START_S = 120.0


@contextmanager
def program(words: Sequence[str], *, python: str = sys.executable) -> Iterator[None]:
    """Run Python with these words until the block ends."""
    with subprocess.Popen([python, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def answering(url: str, path: str = "/readyz") -> str:
    """Return `url` when GET `path` succeeds there. Raises RuntimeError."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}{path}").is_success:
                return url
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer")
