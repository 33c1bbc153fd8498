"""Starts a headless Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, expect, sync_playwright

from tests.processes.waiting import LIMIT_S
from tools.backends.chromium import chromium


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that ends with the block. A process can have one at a time."""
    found = chromium()
    expect.set_options(timeout=1000 * LIMIT_S)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=found.program, env=dict(found.environment), timeout=1000 * LIMIT_S
        )
        yield opened
        opened.close()
