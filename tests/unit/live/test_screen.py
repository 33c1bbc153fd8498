"""The screen with and without a terminal."""

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from palimpsest.services.live import screen
from palimpsest.services.live.history_tail import accumulate
from palimpsest.services.live.poller import RunObservation
from palimpsest.services.live.screen import Screen
from palimpsest.services.live.state import Plan, State, state
from tests.processes.waiting import LIMIT_S, until
from tests.records.history_lines import a_line, learner, servers, worker


def a_state() -> State:
    sight = RunObservation(
        servers() | {"learner": learner(), "worker-0": worker()}, accumulate(a_line(i) for i in range(4))
    )
    return state(Plan("t", 10), sight, now=101.0, started=1.0)


def output_of(*, terminal: bool, stop: bool) -> str:
    stopping, looks = threading.Event(), threading.Event()
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, height=24, legacy_windows=False)

    def look() -> State:
        looks.set()
        return a_state()

    with Screen(console, look, stopping=stopping.is_set):
        assert looks.wait(LIMIT_S)
        until(lambda: "version 4" in file.getvalue() if not terminal else "of 10" in file.getvalue())
        if stop:
            stopping.set()
            until(lambda: "stopping" in file.getvalue())
    return file.getvalue()


def test_without_a_terminal_the_output_is_plain_lines():
    output = output_of(terminal=False, stop=False)
    assert "\x1b" not in output
    assert output.startswith("1 min 40 s: version 4/10; success 0.500")


def test_without_a_terminal_a_warning_is_printed_once_until_it_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(screen, "LINE_S", 0.0)

    def alert(versions: int) -> dict[str, object]:
        return {"rule": "clip_idle", "level": "warning", "says": f"nothing is clipped, over {versions} versions"}

    def states() -> Iterator[State]:
        for alerts in ([alert(8)], [alert(9)], [], [alert(12)]):
            sight = RunObservation(servers() | {"learner": learner()}, accumulate([a_line(0, alerts=alerts)]))
            yield state(Plan("t", 10), sight, now=101.0, started=1.0)
        over.set()
        yield a_state()

    over, output, looks = threading.Event(), io.StringIO(), states()
    with Screen(Console(file=output, width=80), lambda: next(looks), stopping=over.is_set):
        assert over.wait(LIMIT_S)
    assert [row for row in output.getvalue().splitlines() if row.startswith("!")] == [
        "! clip_idle: nothing is clipped, over 8 versions",
        "! clip_idle: nothing is clipped, over 12 versions",
    ]


def test_the_terminal_is_restored_at_the_end_of_the_run():
    output = output_of(terminal=True, stop=False)
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is hidden, then shown
    assert "stopping" not in output


def test_a_stop_restores_the_terminal_and_is_acknowledged_at_once():
    output = output_of(terminal=True, stop=True)
    assert output.index("\x1b[?25h") < output.index("stopping ... (")
    assert "stopping ..." in output_of(terminal=False, stop=True)
