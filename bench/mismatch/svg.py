"""Charts as SVG text: axes, lines, intervals. Only what the figures of a measurement need; no library can be relied on
to write a file without a browser."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, GRID = "#1f2937", "#e5e7eb"
FONT = 'font-family="system-ui, sans-serif" font-size="12"'
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes on a drawing; all coordinates in pixels, y downwards."""

    left: float
    top: float
    width: float
    height: float
    x: Range
    """Values at the left and right edge."""
    y: Range
    """Values at the bottom and top edge."""
    shapes: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point.

        >>> Panel(10, 20, 100, 50, x=(0, 1), y=(0, 1)).at(0.5, 1.0)
        (60.0, 20.0)
        """
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + across * self.width, 2), round(self.top + (1 - up) * self.height, 2)

    def title(self, text: str) -> None:
        """Above the axes."""
        self.text(self.left, self.top - 12, text, more='font-weight="600"')

    def text(self, left: float, top: float, text: str, *, anchor: str = "start", more: str = "") -> None:
        """At these pixels."""
        self.shapes.append(
            f'<text x="{left:g}" y="{top:g}" text-anchor="{anchor}" fill="{INK}" {more}>{escape(text)}</text>'
        )

    def x_axis(self, ticks: Sequence[float], name: str) -> None:
        """Grid lines and their values, and what they are of."""
        for tick in ticks:
            x, bottom = self.at(tick, self.y[0])
            self._line((x, self.top), (x, bottom), GRID)
            self.text(x, bottom + 16, f"{tick:g}", anchor="middle")
        self.text(self.left + self.width / 2, self.top + self.height + 36, name, anchor="middle")

    def y_axis(self, ticks: Sequence[float]) -> None:
        """Grid lines and their values."""
        for tick in ticks:
            left, y = self.at(self.x[0], tick)
            self._line((left, y), (self.left + self.width, y), GRID)
            self.text(left - 6, y + 4, f"{tick:g}", anchor="end")

    def curve(self, points: Sequence[tuple[float, float]], color: str, *, dots: bool = True, dash: str = "") -> None:
        """A line, and a dot at each point."""
        places = [self.at(*point) for point in points]
        path = " ".join(f"{x:g},{y:g}" for x, y in places)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashed}/>')
        if dots:
            self.shapes.extend(f'<circle cx="{x:g}" cy="{y:g}" r="2.5" fill="{color}"/>' for x, y in places)

    def whisker(
        self, mean: tuple[float, float], low: tuple[float, float], high: tuple[float, float], color: str
    ) -> None:
        """A dot, and a line from low to high."""
        self._line(self.at(*low), self.at(*high), color, width=2)
        x, y = self.at(*mean)
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{color}"/>')

    def rule(self, start: tuple[float, float], stop: tuple[float, float], color: str) -> None:
        """A thin dashed line between two points."""
        self._line(self.at(*start), self.at(*stop), color, more=' stroke-dasharray="4 3"')

    def _line(
        self, start: tuple[float, float], stop: tuple[float, float], color: str, *, width: float = 1, more: str = ""
    ) -> None:
        self.shapes.append(
            f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{stop[0]:g}" y2="{stop[1]:g}" '
            f'stroke="{color}" stroke-width="{width:g}"{more}/>'
        )


def legend(entries: Sequence[tuple[str, str]], *, left: float, top: float, step: float) -> list[str]:
    """Name and color of each entry, side by side, `step` pixels apart."""
    shapes = []
    for i, (name, color) in enumerate(entries):
        x = left + i * step
        shapes.append(f'<rect x="{x:g}" y="{top - 9:g}" width="14" height="10" rx="2" fill="{color}"/>')
        shapes.append(f'<text x="{x + 20:g}" y="{top:g}" fill="{INK}">{escape(name)}</text>')
    return shapes


def document(panels: Sequence[Panel], more: Sequence[str], *, width: int, height: int, title: str) -> str:
    """The whole drawing, on white so that it can be read on any ground."""
    shapes = "\n".join([*(shape for panel in panels for shape in panel.shapes), *more])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {FONT}>\n'
        f'<title>{escape(title)}</title>\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n{shapes}\n</svg>\n'
    )
