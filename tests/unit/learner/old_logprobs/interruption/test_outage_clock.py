"""An outage is a gap between reads; it extends a cut up to a limit."""

import pytest

from palimpsest.services.learner.old_logprobs.interruption.outage_clock import MOST_LOST_S, OUTAGE_S, OutageClock


def test_the_first_read_has_no_gap() -> None:
    assert OutageClock().read(now=1e6) == 0.0


@pytest.mark.parametrize(("gap_s", "lost_s"), [(0.1, 0.0), (OUTAGE_S - 0.01, 0.0), (OUTAGE_S, OUTAGE_S), (99.0, 99.0)])
def test_only_a_long_gap_is_an_outage(gap_s: float, lost_s: float) -> None:
    outages = OutageClock()
    outages.read(now=0.0)
    assert outages.read(now=gap_s) == lost_s
    assert outages.read(now=gap_s) == 0.0, "it counts once"


def test_regular_reads_are_no_outage() -> None:
    outages = OutageClock()
    assert [outages.read(now=float(now)) for now in range(0, 4000, 4)] == [0.0] * 1000


def test_without_an_outage_a_cut_is_not_extended() -> None:
    assert not OutageClock().extends_cut(0.0)


def test_one_outage_of_any_length_extends_a_cut() -> None:
    assert OutageClock().extends_cut(11 * MOST_LOST_S)


def test_the_extension_of_a_cut_is_bounded() -> None:
    outages = OutageClock()
    outages.begin_cut()
    extended = 0
    while outages.extends_cut(100.0):
        extended += 1
    assert extended == MOST_LOST_S // 100
    outages.begin_cut()
    assert outages.extends_cut(100.0), "the next cut counts its own outages"
