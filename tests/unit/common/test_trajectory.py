"""Segments over tokens: version and log-prob of each token, and refused segments."""

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.trajectory import (
    MalformedTrajectory,
    Segment,
    behavior_logprobs,
    check,
    cuts,
    token_versions,
    trainable,
)
from palimpsest.common.versions import UNTRAINABLE, Version


def packed(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def a_segment(start: int, stop: int, version: int) -> Segment:
    return Segment(start, stop, Version(version), packed(*([-0.5] * (stop - start))))


@dataclass(frozen=True)
class Tokens:
    """Version and log-prob of each token; None where the token was not sampled."""

    sampled: list[tuple[int, float] | None]
    turns: list[int]
    """Which turn each token belongs to; a segment never reaches over the end of one."""


@st.composite
def trajectories(draw: st.DrawFn) -> Tokens:
    sampled: list[tuple[int, float] | None] = []
    turns: list[int] = []
    version = 0
    for turn in range(draw(st.integers(0, 4))):
        prompt = draw(st.integers(0, 3))
        sampled += [None] * prompt
        turns += [turn] * prompt
        for _ in range(draw(st.integers(0, 6))):
            version += draw(st.sampled_from([0, 0, 0, 1, 2]))
            sampled.append((version, draw(st.floats(-50, 0, width=32))))
            turns.append(turn)
    return Tokens(sampled, turns)


def segments_of(tokens: Tokens) -> list[Segment]:
    """Return the longest runs of one version in one turn, computed token by token."""
    runs: list[list[int]] = []
    for t, sampled in enumerate(tokens.sampled):
        if sampled is None:
            continue
        before = tokens.sampled[t - 1] if t else None
        if before is not None and before[0] == sampled[0] and tokens.turns[t - 1] == tokens.turns[t]:
            runs[-1].append(t)
        else:
            runs.append([t])
    return [
        Segment(
            run[0],
            run[-1] + 1,
            Version(tokens.sampled[run[0]][0]),  # type: ignore[index]
            packed(*(tokens.sampled[t][1] for t in run)),  # type: ignore[index]
        )
        for run in runs
    ]


@settings(deadline=None)
@given(trajectories())
def test_segments_give_every_token_its_version_and_log_prob(tokens: Tokens) -> None:
    segments, count = segments_of(tokens), len(tokens.sampled)
    check(segments, count)
    assert token_versions(segments, count).tolist() == [s[0] if s else UNTRAINABLE for s in tokens.sampled]
    assert behavior_logprobs(segments, count).tolist() == [s[1] if s else 0.0 for s in tokens.sampled]
    assert trainable(segments) == sum(s is not None for s in tokens.sampled)


@settings(deadline=None)
@given(st.integers(1, 30), st.data())
def test_18_10_a_version_that_switches_at_token_j_begins_exactly_there(length: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(1, length))
    segments = [a_segment(3, 3 + j, 4), a_segment(3 + j, 4 + length, 5)]
    count = length + 6
    check(segments, count)
    versions = token_versions(segments, count).tolist()
    assert versions == [-1] * 3 + [4] * j + [5] * (length + 1 - j) + [-1] * 2
    assert cuts(segments) == [3 + j]
    assert versions[3 + j - 1 : 3 + j + 1] == [4, 5]


def test_a_change_of_version_between_turns_is_no_cut() -> None:
    assert cuts([a_segment(1, 3, 4), a_segment(5, 7, 5)]) == []


def test_adjacent_segments_of_one_version_have_no_cut_between_them() -> None:
    assert cuts([a_segment(1, 3, 4), a_segment(3, 7, 4)]) == []


def test_a_trajectory_without_segments_is_valid_and_untrainable() -> None:
    check([], 3)
    assert token_versions([], 3).tolist() == [UNTRAINABLE] * 3
    assert trainable([]) == 0


SOUND = a_segment(1, 3, 2)
MALFORMED = {
    "negative version": (Segment(4, 5, Version(-1), packed(-1)), "versions start at 0"),
    "overlap": (
        Segment(2, 5, Version(3), packed(-1, -1, -1)),
        "starts before token 3, where the previous segment ends",
    ),
    "out of order": (Segment(0, 1, Version(3), packed(-1)), "starts before token 3"),
    "empty": (Segment(5, 5, Version(3), b""), "holds no token"),
    "backwards": (Segment(6, 5, Version(3), b""), "holds no token"),
    "beyond the end": (Segment(7, 9, Version(3), packed(-1, -1)), "ends after the last of 8 tokens"),
    "too few log-probs": (Segment(5, 7, Version(3), packed(-1)), "2 tokens but 4 bytes of log-probs"),
    "too many log-probs": (Segment(5, 7, Version(3), packed(-1, -1, -1)), "2 tokens but 12 bytes of log-probs"),
    "half a log-prob": (Segment(5, 7, Version(3), packed(-1, -1)[:-1]), "2 tokens but 7 bytes of log-probs"),
    "not a number": (Segment(5, 7, Version(3), packed(-1, float("nan"))), "a behavior log-prob is not finite"),
    "minus infinity": (Segment(5, 7, Version(3), packed(float("-inf"), -1)), "a behavior log-prob is not finite"),
    "above 0": (Segment(5, 7, Version(3), packed(-1, 0.01)), "a behavior log-prob is above 0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_segment_is_refused_with_its_span_and_version(case: str) -> None:
    segment, reason = MALFORMED[case]
    with pytest.raises(MalformedTrajectory) as error:
        check([SOUND, segment], 8)
    message = str(error.value)
    assert message.startswith(f"segment 1 [{segment.start}, {segment.stop}) of version {segment.version}: ")
    assert reason in message


def test_a_segment_that_starts_before_the_first_token_is_refused() -> None:
    with pytest.raises(MalformedTrajectory, match=r"^segment 0 \[-1, 2\) of version 0: starts before token 0"):
        check([Segment(-1, 2, Version(0), packed(-1, -1, -1))], 8)


def test_log_probs_slightly_above_0_are_accepted() -> None:
    check([Segment(0, 2, Version(0), packed(0.0, 0.0009))], 2)
