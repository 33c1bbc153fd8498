"""For any tokens and cuts, segments cover sampled tokens exactly once (style.md, section 7)."""

import pytest
from hypothesis import given, strategies as st

from palimpsest.common.arrays import unpack_float32, unpack_int32
from palimpsest.common.trajectory import check, cuts, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.rollout.engine.port import SampledTokens, Span
from palimpsest.services.rollout.trajectory_builder import Contradiction, TrajectoryBuilder


def sampled(versions: list[int], first: int = 0) -> SampledTokens:
    """One token per version; token and log-prob encode their index."""
    spans: list[Span] = []
    for i, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = Span(Version(version), spans[-1].start, i + 1)
        else:
            spans.append(Span(Version(version), i, i + 1))
    tokens = tuple(1000 + first + i for i in range(len(versions)))
    return SampledTokens(tokens, tuple(-(first + i) / 8 for i in range(len(versions))), tuple(spans), stopped=True)


turns = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=8).map(sorted),  # versions never decrease
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=6,
)


@given(st.integers(1, 5), turns)
def test_segments_cover_sampled_tokens_exactly_once(prompt: int, dialogue: list[tuple[list[int], int]]) -> None:
    builder = TrajectoryBuilder(range(prompt))
    expected_tokens, expected_versions = list(range(prompt)), [UNTRAINABLE] * prompt
    expected_cuts = []
    for versions, answer in dialogue:
        message = sampled(versions, first=len(expected_tokens))
        expected_cuts += [len(expected_tokens) + i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
        builder.add_sampled(message)
        builder.add_environment([7] * answer)
        expected_tokens += [*message.tokens, *[7] * answer]
        expected_versions += [*versions, *[UNTRAINABLE] * answer]
    assert unpack_int32(builder.pack()).tolist() == expected_tokens == builder.tokens
    check(builder.segments, len(expected_tokens))
    assert token_versions(builder.segments, len(expected_tokens)).tolist() == expected_versions
    assert builder.turns == len(dialogue)
    separate = [cut for cut in cuts(builder.segments) if expected_versions[cut - 1] != UNTRAINABLE]
    assert set(expected_cuts) <= set(separate)
    for segment in builder.segments:  # each log-prob belongs to its token
        assert unpack_float32(segment.behavior_logprobs).tolist() == [
            -(expected_tokens[t] - 1000) / 8 for t in range(segment.start, segment.stop)
        ]


@pytest.mark.parametrize(
    "bad",
    [
        SampledTokens((1, 2), (-1.0,), (Span(Version(0), 0, 2),), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (Span(Version(0), 0, 1),), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (Span(Version(0), 0, 3),), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (Span(Version(0), 1, 2),), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (Span(Version(0), 0, 1), Span(Version(1), 0, 2)), stopped=True),
        SampledTokens((1, 2), (-1.0, -1.0), (Span(Version(-1), 0, 2),), stopped=True),
    ],
)
def test_spans_that_do_not_cover_the_tokens_are_refused(bad: SampledTokens) -> None:
    builder = TrajectoryBuilder([5])
    with pytest.raises(Contradiction):
        builder.add_sampled(bad)
    assert builder.tokens == [5]
    assert builder.segments == ()
