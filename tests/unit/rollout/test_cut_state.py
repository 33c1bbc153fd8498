"""State of cuts from the control topic, with duplicate and late records; and which trajectories a cut flushes."""

import random

import pytest

from palimpsest.common.arrays import pack_float32, unpack_int32
from palimpsest.common.messages import Control, CutReleased, CutRequested, GroupOffered, RunFinished, VersionPublished
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.rollout.cut_state import CutState, flush
from palimpsest.services.rollout.engine.port import SampledTokens, Span
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder
from tests.records.builders import SAMPLING


def request(cut: int, version: int) -> CutRequested:
    return CutRequested("test", cut, Version(version), 5.0)


def release(cut: int) -> CutReleased:
    return CutReleased("test", cut)


def published(version: int, at: float = 0.0) -> VersionPublished:
    return VersionPublished("test", Version(version), f"digest {version}", at)


def after(*messages: Control) -> tuple[int | None, int]:
    """Return the open cut and the held version after these messages."""
    cuts = CutState()
    for message in messages:
        cuts.observe(message)
    return (cuts.open.cut if cuts.open is not None else None), cuts.held


@pytest.mark.parametrize(
    ("messages", "stands"),
    [
        ([], (None, -1)),
        ([published(0), published(1)], (None, -1)),
        ([published(0), request(1, 0)], (1, 0)),
        ([published(0), request(1, 0), published(1)], (None, 0)),
        ([published(0), request(1, 0), release(1)], (None, -1)),
        ([published(3), request(7, 3), release(7)], (None, 2)),
        ([published(3), request(7, 3), release(6)], (7, 3)),
        ([published(3), request(7, 3), published(3, at=1.0)], (None, 2)),  # the learner restarts
        ([published(3), request(7, 3), request(8, 3)], (8, 3)),  # and has published nothing yet
        ([published(3), request(7, 3), request(8, 3), release(7)], (8, 3)),
        ([published(3), request(7, 3), published(4), request(8, 4), release(8)], (None, 3)),
        ([published(3), request(7, 3), RunFinished("test", Version(3))], (7, 3)),
        # from a replaced learner; its successor does not know that number
        ([published(2), published(3), request(7, 2)], (None, -1)),
        ([published(2), published(3), request(7, 2), request(7, 3)], (7, 3)),
    ],
)
def test_a_request_is_open_until_a_later_record_ends_it(
    messages: list[Control], stands: tuple[int | None, int]
) -> None:
    assert after(*messages) == stands


def test_duplicate_records_change_nothing() -> None:
    """For any number of copies, delivered late, the state equals that without copies."""
    records = [
        published(0), request(1, 0), published(1), request(2, 1), published(1, at=1.0), request(3, 1), release(3),
        request(4, 1), published(2), request(5, 2), published(5), request(6, 5),
    ]  # fmt: skip
    chances = random.Random(0)
    for _ in range(300):
        delivered, clean = CutState(), CutState()
        for place, message in enumerate(records):
            delivered.observe(message)
            clean.observe(message)
            for copy in chances.choices(records[: place + 1], k=chances.randrange(3)):
                if not (isinstance(copy, CutReleased) and clean.open is not None and copy.cut == clean.open.cut):
                    delivered.observe(copy)
            assert (delivered.open, delivered.held) == (clean.open, clean.held)


def test_a_replaced_version_is_never_released() -> None:
    """For random control records, the held version is the last replaced version or a later one."""
    chances = random.Random(1)
    for _ in range(300):
        cuts, version, cut = CutState(), 0, 0
        cuts.observe(published(0))
        for at in range(20):
            match chances.randrange(4):
                case 0 | 1:
                    cut += 1
                    cuts.observe(request(cut, version))
                    assert cuts.held == version
                case 2 if cut:
                    cuts.observe(chances.choice([release(cut), published(version, at=float(at + 1))]))
                case 3 if cuts.open is not None:
                    version += 1
                    cuts.observe(published(version))
                    assert cuts.open is None
            assert cut == 0 or version - 1 <= cuts.held <= version


def a_live(*versions: int) -> InFlightTrajectory:
    """Two prompt tokens, then one message with one token of each of these versions."""
    group = GroupOffered("test", "g000007", 7, Version(0), "lookup", 3, 2, SAMPLING, 600.0)
    builder = TrajectoryBuilder([1, 2])
    builder.add_sampled(sampled(*versions))
    return InFlightTrajectory(group, "g000007/1", 2, builder)


def sampled(*versions: int) -> SampledTokens:
    spans = tuple(Span(Version(version), i, i + 1) for i, version in enumerate(versions))
    return SampledTokens(tuple(range(50, 50 + len(versions))), (-0.5,) * len(versions), spans, stopped=True)


def test_a_flush_holds_all_tokens_including_the_partial_message() -> None:
    live = a_live(3)
    live.assembly.add_environment([9])
    partial = SampledTokens(
        (70, 71, 72), (-1.0, -2.0, -3.0), (Span(Version(3), 0, 1), Span(Version(4), 1, 3)), stopped=False
    )
    record = flush(live, live.assembly.with_partial(partial), request=request(5, 4), worker="worker-0")
    assert record is not None
    assert (record.run, record.trajectory, record.group) == ("test", "g000007/1", "g000007")
    assert (record.attempt, record.worker, record.cut, record.temperature) == (2, "worker-0", 5, SAMPLING.temperature)
    assert unpack_int32(record.tokens).tolist() == [1, 2, 50, 9, 70, 71, 72]
    assert record.segments == (
        Segment(2, 3, Version(3), pack_float32([-0.5])),
        Segment(4, 5, Version(3), pack_float32([-1.0])),
        Segment(5, 7, Version(4), pack_float32([-2.0, -3.0])),
    )
    assert live.assembly.tokens == [1, 2, 50, 9]  # the message is partial


@pytest.mark.parametrize(
    ("versions", "flushed", "version", "sent"),
    [
        ((), 0, 4, False),
        ((3, 3), 0, 4, False),
        ((4, 4), 0, 4, True),
        ((3, 4), 0, 4, True),
        ((3, 4), 0, 3, True),
        ((4, 4), 4, 4, False),  # all tokens were flushed before
        ((4, 4, 4), 4, 4, True),
        ((4, 4, 5), 4, 4, False),
        ((4, 4, 5), 4, 5, True),
    ],
)
def test_a_trajectory_is_flushed_only_if_it_has_unflushed_tokens_of_the_cuts_version(
    versions: tuple[int, ...], flushed: int, version: int, sent: bool
) -> None:
    live = a_live(*versions)
    live.flushed = flushed
    record = flush(live, live.assembly, request=request(1, version), worker="w")
    assert (record is not None) == sent
    if record is not None:
        assert (record.tokens, record.segments) == (live.assembly.pack(), live.assembly.segments)
