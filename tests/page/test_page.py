"""The page of a learner without a run: access, figures, tokens, controls, keyboard, contrast, narrow screens."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import NARROW, WIDE
from tests.page.layout import boxes, contrasts, overlaps, side_by_side

pytestmark = pytest.mark.servers
FIGURES = ["Entropy", "Gradient norm", "Learning rate", "Length", "Cut timeline"]
LOOKS = [("light", WIDE), ("light", NARROW), ("dark", WIDE), ("dark", NARROW)]


@pytest.fixture
def opened(new_page: Callable[..., Page], learner_page: str) -> Callable[..., Page]:
    """Open the page with a token."""

    def open_page(token: str = "tune", **options: object) -> Page:
        page = new_page(**options)
        page.goto(learner_page)
        page.get_by_label("Token of a role that may view").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("#waits tbody tr")).to_have_count(2)
        expect(page.locator(".token").first).to_be_visible()
        return page

    return open_page


def test_the_page_holds_nothing_of_the_run_until_a_token_is_entered(
    new_page: Callable[..., Page], learner_page: str
) -> None:
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(learner_page)))
    page.goto(learner_page)
    expect(page.get_by_label("Token of a role that may view")).to_be_focused()
    assert page.locator("#content").is_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Authorization")
    page.keyboard.type("view")
    page.keyboard.press("Enter")
    expect(page.locator("#waits")).to_contain_text("waits for trajectories: 1 of 4 groups are complete")
    assert {path.split("?")[0].split("/")[0] for path in asked} <= {"", "v1"}, "every request goes to the learner"


def test_it_shows_the_waits_the_figures_and_each_token(opened: Callable[..., Page]) -> None:
    page = opened()
    expect(page.locator("#waits")).to_contain_text("oldest group g000001")
    assert page.locator("#figures h2").all_text_contents() == FIGURES
    tokens = page.locator(".tokens .token")
    assert tokens.all_text_contents() == [f"<{number}>" for number in range(10, 16)]
    assert [tokens.nth(i).evaluate("e => e.className") for i in range(4)] == [
        "token", "token age-1 struck", "token age-0 struck", "token age-0",
    ]  # fmt: skip
    grounds = [tokens.nth(i).evaluate("e => e.style.background") for i in range(3)]
    # the square root of 0.25 and of 0.03125 over 0.5 nats
    assert [text[-17:] for text in grounds] == ["", "71%, transparent)"[-17:], "25%, transparent)"[-17:]]
    tokens.nth(1).hover()
    expect(page.locator(".why")).to_contain_text(
        '"<11>": removed by band_high. Sampled by version 2, staleness 1. log discrepancy 0.25 nats'
    )


def test_the_keyboard_reaches_everything(opened: Callable[..., Page]) -> None:
    page = opened()
    page.locator("body").click(position={"x": 2, "y": 2})
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => { const e = document.activeElement; const s = getComputedStyle(e);
            return [e.ariaLabel || e.id || e.textContent, s.outlineStyle, parseFloat(s.outlineWidth)]; }"""
        )
        reached.append(focused[0])
        assert focused[1:] == ["solid", 3], f"the focus of {focused[0]} cannot be seen"
        if focused[0] == "forget":
            break
    controls = ["Pause training", "Pause offers", "Resume", "Checkpoint", "Cut", "Stop …", "setting", "value", "Set"]
    assert reached[: len(controls)] == controls
    assert [name.split(":")[0] for name in reached[len(controls) : len(controls) + 5]] == FIGURES
    assert reached[-5:] == ["batch", "row", "ratio", "<10>", "forget"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".why")).to_contain_text('"<11>"')


def test_enter_sends_an_action_and_a_refusal_is_shown(opened: Callable[..., Page]) -> None:
    page = opened("view")
    page.get_by_role("button", name="Pause training").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("view has the role view")
    page = opened("operate")
    page.get_by_role("button", name="Checkpoint").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("checkpoint: applied at version 1")
    expect(page.locator("#changes")).to_contain_text("checkpoint")
    page.get_by_role("button", name="Stop …").click()
    expect(page.get_by_role("button", name="Keep the run")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop …")).to_be_focused()
    assert "stop" not in (page.locator("#changes").text_content() or "")


@pytest.mark.parametrize(("scheme", "size"), LOOKS)
def test_text_can_be_read_and_nothing_overlaps(opened: Callable[..., Page], scheme: str, size: dict[str, int]) -> None:
    page = opened(color_scheme=scheme, viewport=size)
    expect(page.locator("svg.chart")).to_have_count(len(FIGURES))
    assert [found for found in contrasts(page) if found[1] < 4.5] == []
    assert overlaps(boxes(page, "svg.chart text")) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    assert page.evaluate(
        """[...document.querySelectorAll('svg.chart')].every(svg => { const outer = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].every(t => { const r = t.getBoundingClientRect();
        return r.left >= outer.left - 1 && r.right <= outer.right + 1; }); })"""
    ), "a label is cut"
    if size is NARROW:
        assert side_by_side(boxes(page, "svg.chart")) == []
