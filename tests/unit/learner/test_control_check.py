"""Records of `control` are accepted from the learner that has the run, as a real store knows it."""

from collections.abc import Callable

import numpy as np
import pytest

from palimpsest.common.messages import Control, CutReleased, CutRequested, GroupOffered, RunFinished, VersionPublished
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from tests.records.builders import SAMPLING

CANARY = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())
LATE = "late"
MADE: dict[str, Callable[[int, int], Control]] = {
    "version": lambda version, writer: VersionPublished("test", Version(version), "", 0.0, writer),
    "cut": lambda version, writer: CutRequested("test", 1, Version(version), 5.0, writer),
    "end": lambda version, writer: RunFinished("test", Version(version), writer),
}


def put(store: SnapshotClient, version: int, writer: int) -> None:
    raw = np.full(64, version, dtype=np.uint8)
    store.put("test", Version(version), [RawTensor("w", "bfloat16", (4, 8), raw)], [CANARY], writer=writer)


def cause(check: ControlCheck, message: Control, *, history: bool = False) -> RejectCause | str | None:
    """The cause of the rejection, LATE for a record of a replaced learner, None for an accepted one."""
    try:
        return None if check.check(message, history=history) else LATE
    except RejectedRecord as error:
        return error.cause


@pytest.fixture
def check(store: SnapshotClient) -> ControlCheck:
    """A check against a store with two learners, of which the second has the run, and versions 0 and 1."""
    put(store, 0, 1)  # the fixture began the first learner
    Writer(store).begin()
    put(store, 1, 2)
    return ControlCheck(store)


@pytest.mark.parametrize("kind", MADE)
def test_records_of_the_learner_that_has_the_run_are_accepted(check: ControlCheck, kind: str) -> None:
    assert cause(check, MADE[kind](0, 1)) is None
    assert cause(check, MADE[kind](1, 2)) is None
    assert cause(check, CutReleased("test", 1, 2)) is None


@pytest.mark.parametrize("kind", MADE)
def test_made_up_records_are_rejected(check: ControlCheck, kind: str) -> None:
    assert cause(check, MADE[kind](10**9, 2)) is RejectCause.UNKNOWN_VERSION
    for writer in (0, -1, 3, 10**9):
        assert cause(check, MADE[kind](1, writer)) is RejectCause.UNKNOWN_WRITER, writer
    assert cause(check, MADE[kind](1, 2)) is None, "a rejected record changes nothing"


def test_offers_of_learners_that_the_store_does_not_know_are_rejected(check: ControlCheck) -> None:
    def rejected(version: int, writer: int, *, history: bool = False) -> RejectCause | None:
        offer = GroupOffered("test", "g000000", 0, Version(version), "lookup", 7, 2, SAMPLING, 60.0, writer)
        try:
            check.check_offer(offer, history=history)
        except RejectedRecord as error:
            return error.cause
        return None

    assert cause(check, MADE["version"](1, 2)) is None
    assert rejected(1, 2) is rejected(1, 1) is None, "the learner continues the offers of the one that it replaced"
    assert rejected(10**9, 2) is RejectCause.UNKNOWN_VERSION
    for writer in (0, -1, 3, 10**9):
        assert rejected(1, writer) is RejectCause.UNKNOWN_WRITER, writer
    assert rejected(1, 0, history=True) is None, "earlier releases wrote no epoch"


def test_a_late_record_of_a_replaced_learner_is_passed_over(check: ControlCheck) -> None:
    assert cause(check, MADE["version"](1, 2)) is None
    assert cause(check, MADE["end"](1, 1)) is LATE
    assert cause(check, MADE["cut"](1, 0), history=True) is LATE


def test_records_of_earlier_releases_are_accepted_only_before_the_reader_started(check: ControlCheck) -> None:
    assert cause(check, MADE["version"](1, 0), history=True) is None
    assert cause(check, MADE["version"](1, 0)) is RejectCause.UNKNOWN_WRITER
    assert cause(check, MADE["version"](1, 2)) is None


def test_the_store_is_asked_only_about_what_is_new(store: SnapshotClient, check: ControlCheck) -> None:
    message = MADE["version"](1, 2)
    assert check.asks_store(message)
    check.check(message)
    assert not check.asks_store(message)
    put(store, 2, 2)
    assert check.asks_store(newer := MADE["version"](2, 2))
    assert cause(check, newer) is None
