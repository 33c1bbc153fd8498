"""The text of the live view: its numbers, and its size."""

import io

import pytest
from rich.console import Console

from palimpsest.common.messages import VersionApplied
from palimpsest.common.versions import Version
from palimpsest.services.live.history_tail import accumulate
from palimpsest.services.live.poller import RunObservation, ServiceObservation
from palimpsest.services.live.state import Plan, State, state
from palimpsest.services.live.view import bar, line, sparkline, view
from palimpsest.services.local.exit_reasons import Crash
from tests.records.history_lines import a_line, learner, servers, worker

BY_STALENESS = {
    0: {"tokens": 30.0, "log_discrepancy_abs": 0.00121, "clipped": 0.25},
    2: {"tokens": 90.0, "log_staleness_ratio_abs": 0.0345, "masked": 0.125},
}


def a_state(lines: int = 5, **services: ServiceObservation) -> State:
    history = [a_line(i, successes="0001", reward=0.4) for i in range(lines - 1)]
    history += [a_line(lines - 1, successes="0111", reward=0.9, tokens=BY_STALENESS)] if lines else []
    update = VersionApplied("t", "worker-0", Version(4), "", True, 0.01, 0.172, 9)
    seen = servers() | {
        "learner": learner(versions=20),
        "worker-0": worker(earlier=worker(at=90.0, sampled_tokens=400)),
    }
    sight = RunObservation(seen | services, accumulate(history), (update,))
    return state(Plan("night-run", 20), sight, now=101.0, started=1.0, crashes=[Crash("learner", 50.0, 1, "E: x")])


def text(shown: State, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(view(shown, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_80_columns_show_every_value():
    rows = text(a_state(), 80, 24)
    assert max(map(len, rows)) <= 80
    assert len(rows) <= 24
    whole = "\n".join(rows)
    for expected in (
        "night-run",
        "1 min 40 s",
        "version 5 of 20",
        "25 %, about 15 s left",
        "0.350",  # success over the newest five: (4 * 0.25 + 0.75) / 5
        "0.500",
        "60 rollout, 38 learner",  # 600 tokens in 10 s; 150 after the first version, in 4 s
        "12 in flight, 7 waiting for training",
        "10 trained, 0 dropped, 0 dead-lettered",
        "0.00121",
        "0.03450",
        "12.5 %",
        "25.0 %",
        "trains on the batch at version 5",
        "samples with version 4, 12 in flight, last update paused 172 ms",
        "learner crashed after 49 s (exit code 1: E: x); it was restarted",
    ):
        assert expected in whole, expected


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("lines", [0, 5])
def test_the_view_fits_into_the_terminal(width: int, lines: int):
    for height in range(1, 60):
        rows = text(a_state(lines), width, height)
        assert len(rows) <= height
        assert max(map(len, rows)) <= width


def test_the_smallest_terminal_shows_the_progress():
    assert any("version 5 of 20" in row for row in text(a_state(), 60, 3))


def test_during_setup_each_service_shows_its_wait():
    shown = a_state(0, **{"worker-0": worker(seconds=0.0, waiting_for="the engine"), "learner": ServiceObservation()})
    rows = text(shown, 80, 24)
    assert any("night-run" in row and "starting" in row for row in rows)
    assert any("worker-0" in row and "waits for the engine" in row for row in rows)
    assert any("learner" in row and "starting" in row for row in rows)


def test_a_resumed_run_shows_its_history_during_setup():
    shown = a_state(5, **{"worker-0": worker(seconds=0.0, waiting_for="the engine")})
    assert any("version 5 of 20" in row for row in text(shown, 80, 24))


def test_a_surrogate_is_named_and_its_ratios_are_not_called_discrepancy():
    shown = a_state(5)
    assert shown.last is not None
    shown.last.update(exact=False, proximal="current_recompute")
    for width, names in ((80, ("|log corr.|", "|log upd.|")), (140, ("|log correction|", "|log update|"))):
        whole = "\n".join(text(shown, width, 40))
        assert ("proximal: current_recompute" in whole) == (width == 140)  # frames have titles
        assert all(name in whole for name in names)
        assert "discr" not in whole


def test_drops_are_shown_by_reason():
    ledger = {"offered": 9, "trained": 2, "dropped": {"deadline": 2, "engine_failed": 1}, "dead_lettered": 4}
    rows = text(a_state(5, learner=learner(trajectories=ledger)), 100, 30)
    assert any("3 dropped (2 deadline, 1 engine_failed), 4 dead-lettered" in row for row in rows)


def test_the_line_has_the_same_values():
    assert line(a_state()) == (
        "1 min 40 s: version 5/20; success 0.350, reward 0.500; staleness 0.5 mean, 2 max; tokens/s 60 rollout, "
        "38 learner; 12 in flight, 7 waiting; about 15 s left"
    )
    starting = a_state(0, **{"worker-0": worker(seconds=0.0, waiting_for="the engine")})
    assert line(starting) == "1 min 40 s: starting; worker-0: waits for the engine"


def test_the_line_shows_what_the_learner_does_while_its_pace_is_unknown():
    assert line(a_state(0)).endswith("7 waiting; learner trains on the batch at version 5")


def test_the_line_shows_finishing_after_the_last_version():
    assert line(a_state(20)).endswith("7 waiting; finishing")


def test_bars_and_sparklines_keep_their_width():
    assert [len(bar(share / 100, 10)) <= 10 for share in range(-5, 110)] == [True] * 115
    assert sparkline([], 10) == ""
    assert len(sparkline([0.1] * 300, 40)) == 40
    assert sparkline([0.0, 0.0], 10) == "▁▁"
