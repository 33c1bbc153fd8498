"""A headless Chromium, and the page of a learner without a run. A missing browser is an error."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page

from palimpsest.common.control.access import TOKENS_FILE, Role, token_line
from palimpsest.common.control.credentials import open_access
from palimpsest.common.service import Server
from tests.contract.http_services import APPS
from tests.page.browser import open_browser
from tests.processes.waiting import LIMIT_S

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser of one test file."""
    with open_browser() as opened:
        yield opened


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page without history. An error in a script fails the test."""
    errors: list[str] = []
    contexts = []

    def open_page(**options: object) -> Page:
        context = browser.new_context(**{"viewport": WIDE, **options})  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * LIMIT_S)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def learner_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a learner whose tokens are `view`, `operate` and `tune`. Its loop applies every change at once."""
    folder = tmp_path_factory.mktemp("page")
    file = folder / "tokens"
    file.write_text("\n".join(token_line(role, role, role) for role in Role))
    app = APPS["learner"](open_access({TOKENS_FILE: str(file)}), folder / "learner")
    with Server(app, "127.0.0.1", 0, key="learner") as server:
        yield f"http://127.0.0.1:{server.port}/"
