"""Shows the progress of a run: a live view on a terminal, else a line every few seconds."""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

from palimpsest.services.live.outages import ended_text, full_text
from palimpsest.services.live.state import State, subject
from palimpsest.services.live.view import line, view

REFRESH_S = 0.5
LINE_S, NEWS_S = 10.0, 1.0
"""Intervals without a terminal, in seconds: between progress lines, and between checks for urgent lines."""
LOOK_S = 0.1


class Screen:
    """Draws in its own thread, so that slow services do not block the view.

    After a stop request, the live view ends at once and plain text follows.
    """

    def __init__(self, console: Console, look: Callable[[], State], *, stopping: Callable[[], bool]) -> None:
        self._console, self._look, self._stopping = console, look, stopping
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        (self._draw if self._console.is_terminal else self._tell)()
        if self._stopping():
            self._say("stopping ... (the services finish their work in progress; press Ctrl-C again to end them now)")

    def _draw(self) -> None:
        size = self._console.size
        with Live(console=self._console, auto_refresh=False) as live:
            while self._going():
                if self._console.size != size:
                    self._console.clear()  # a narrower terminal wraps the existing lines
                    size = self._console.size
                live.update(view(self._look(), width=size.width, height=size.height - 1), refresh=True)
                self._wait(REFRESH_S)
            live.update(view(self._look(), width=size.width, height=size.height - 1), refresh=True)

    def _tell(self) -> None:
        shown, shown_outages = set[str](), set[str]()
        over_so_far, due = 0, time.monotonic()
        while self._going():
            state = self._look()
            for past in state.past[over_so_far:]:
                self._say(ended_text(past))
            over_so_far = len(state.past)
            outages = {f"{outage.of} {outage.address}": full_text(outage, state.wall) for outage in state.outages}
            shown_outages = self._news(outages, shown_outages)
            if time.monotonic() >= due:
                shown = self._news({subject(warning): warning for warning in state.warnings}, shown)
                self._say(line(state))
                due = time.monotonic() + LINE_S
            self._wait(min(LINE_S, NEWS_S))
        if not self._stopping():  # show the warnings that arrived since the last line
            self._news({subject(warning): warning for warning in self._look().warnings}, shown)

    def _news(self, now: Mapping[str, str], shown: Collection[str]) -> set[str]:
        """Print the texts of `now` whose subject is not in `shown`. Return the subjects of `now`."""
        for new in [warning for of, warning in now.items() if of not in shown]:
            self._say(f"! {new}")
        return set(now)

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _going(self) -> bool:
        return not (self._closed.is_set() or self._stopping())

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._going() and time.monotonic() < deadline:
            self._closed.wait(LOOK_S)
