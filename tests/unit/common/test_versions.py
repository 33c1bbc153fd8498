"""Versions and staleness."""

import pytest

from palimpsest.common.versions import Version, staleness


@pytest.mark.parametrize(("now", "sampled", "expected"), [(0, 0, 0), (7, 7, 0), (7, 5, 2), (1000, 1, 999)])
def test_staleness_counts_the_versions_published_since(now: int, sampled: int, expected: int) -> None:
    assert staleness(Version(now), Version(sampled)) == expected


def test_a_token_of_a_later_version_is_refused_with_its_version() -> None:
    with pytest.raises(
        ValueError, match=r"a token of version 6 cannot be trained on at version 5: it is in the future"
    ):
        staleness(Version(5), Version(6))
