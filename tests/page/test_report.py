"""The report in a browser, on wide and narrow screens."""

from collections.abc import Callable

import msgspec
import pytest
from playwright.sync_api import Page, expect

from palimpsest.run import conclude
from tests.page.conftest import NARROW, WIDE
from tests.page.layout import Box, boxes, contrasts, overlaps, side_by_side
from tests.records.batches import write_batch
from tests.records.history_lines import a_full_line

pytestmark = pytest.mark.servers
RUN = 'run.id = "test"\nmodel.path = "missing"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 30\n'
AXES = ".nsewdrag, svg.chart"
TEXTS = ".xtitle, .ytitle, .legendtext, .xtick text, .ytick text, .gtitle"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the report of a run with every figure."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "run.toml").write_text(RUN)
    (folder / "history.jsonl").write_bytes(
        b"".join(msgspec.json.encode(a_full_line(version)) + b"\n" for version in range(30))
    )
    write_batch(folder / "records", now=29)
    conclude(folder)
    return (folder / "report.html").as_uri()


def within_figures(page: Page, selector: str) -> list[list[Box]]:
    """Boxes of the elements of each figure."""
    count = page.locator("figure").count()
    found = []
    for i in range(count):
        page.evaluate(
            "i => document.querySelectorAll('figure').forEach((f, n) => f.toggleAttribute('data-now', n === i))", i
        )
        if page.locator(f"figure[data-now] :is({selector})").count():
            found.append(boxes(page, f"figure[data-now] :is({selector})"))
    return found


@pytest.mark.parametrize(("scheme", "size"), [("light", NARROW), ("dark", WIDE)])
def test_nothing_overlaps_and_narrow_axes_are_one_below_the_other(
    new_page: Callable[..., Page], report: str, scheme: str, size: dict[str, int]
) -> None:
    page = new_page(color_scheme=scheme, viewport=size)
    page.goto(report)
    expect(page.locator("svg.chart")).to_have_count(5)
    expect(page.locator(".token.struck").first).to_be_visible()
    for found in within_figures(page, TEXTS):
        assert overlaps(found) == []
    assert [found for found in contrasts(page) if found[1] < 4.5] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the report is wider than the screen"
    if size is NARROW:
        assert side_by_side(boxes(page, AXES)) == []
