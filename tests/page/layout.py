"""Measures a page in a browser: places of elements, and the contrast of its text as WCAG 2.2 defines it."""

from itertools import combinations
from typing import Any

from playwright.sync_api import Page

Box = dict[str, Any]
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => under.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const light = (color) => {
    const [r, g, b] = color.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), under = ground(element);
    const ink = over(rgba(element.namespaceURI.endsWith("svg") ? style.fill : style.color), under);
    const [low, high] = [light(ink), light(under)].sort((a, b) => a - b);
    const name = `${element.tagName}.${element.getAttribute("class") ?? ""}: ${element.textContent.slice(0, 40)}`;
    found.push([name, (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""


def contrasts(page: Page) -> list[tuple[str, float]]:
    """Return each visible element with text of its own, and the contrast of the text to its ground."""
    found = [(str(name), float(value)) for name, value in page.evaluate(CONTRASTS)]
    assert found
    return found


def boxes(page: Page, selector: str) -> list[Box]:
    """Return text and rectangle of the visible elements, without text at an angle, whose rectangle says little."""
    found: list[Box] = page.evaluate(
        """selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()
        && !/rotate[(](?!-?(0|90)[ ,.)])/.test(e.getAttribute("transform") ?? "")).map(e => {
        const r = e.getBoundingClientRect();
        return { text: e.textContent.slice(0, 40), left: r.left, right: r.right, top: r.top, bottom: r.bottom }; })""",
        selector,
    )
    assert found
    return found


def overlaps(found: list[Box]) -> list[tuple[str, str]]:
    """Return the pairs whose rectangles share more than a pixel."""
    return [
        (a["text"], b["text"])
        for a, b in combinations(found, 2)
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 1
    ]


def side_by_side(found: list[Box]) -> list[tuple[str, str]]:
    """Return the pairs of which one is beside the other."""
    return [
        (a["text"], b["text"])
        for a, b in combinations(found, 2)
        if min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 1
        and (a["right"] <= b["left"] + 1 or b["right"] <= a["left"] + 1)
    ]
