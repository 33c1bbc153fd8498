"""Which versions a sweep may remove."""

from hypothesis import given, settings, strategies as st

from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.retention import removable

VERSIONS = st.sets(st.integers(0, 30).map(Version), max_size=12)
LEASES = st.dictionaries(st.sampled_from(["learner", "replica", "worker"]), st.integers(0, 32).map(Version), max_size=3)


@settings(deadline=None)
@given(VERSIONS, LEASES)
def test_a_version_is_removed_if_every_lease_is_above_it_and_a_newer_one_exists(
    versions: set[Version], leases: dict[str, Version]
) -> None:
    gone = removable(versions, leases)
    assert gone <= versions
    for version in versions:
        needed = any(version >= lowest for lowest in leases.values())
        newest = not any(other > version for other in versions)
        assert (version in gone) == (bool(leases) and not needed and not newest)


@settings(deadline=None)
@given(VERSIONS, LEASES, st.integers(0, 32))
def test_an_additional_lease_never_removes_more_versions(
    versions: set[Version], leases: dict[str, Version], lowest: int
) -> None:
    if leases:
        assert removable(versions, {**leases, "another": Version(lowest)}) <= removable(versions, leases)


def test_without_leases_no_version_is_removed() -> None:
    assert removable({Version(0), Version(1), Version(2)}, {}) == set()


def test_a_lease_above_all_versions_keeps_the_newest() -> None:
    assert removable({Version(0), Version(1), Version(2)}, {"learner": Version(99)}) == {0, 1}
