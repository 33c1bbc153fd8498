"""An application behind a real port, for tests that speak to one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from common.service import Server


@contextmanager
def served(app: FastAPI, *, key: str) -> Iterator[str]:
    """Its address. The server is asked to stop at the end and not waited for: uvicorn takes 0.2 s to notice."""
    server = Server(app, "127.0.0.1", 0, key=key)
    with_it = server.__enter__()
    try:
        yield f"http://127.0.0.1:{with_it.port}"
    finally:
        threading.Thread(target=server.__exit__, args=(None, None, None)).start()
