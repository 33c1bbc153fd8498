"""Objects fetched ahead: the walk needs no download, memory is bounded, and a failure changes nothing."""

from pathlib import Path

import pytest

from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import Version
from tests.unit.common.test_walker import Versions, a_chain, held


def walked(tmp_path: Path, store: Versions, ahead: FetchAhead, *, seen: int = 1) -> tuple[Walker, RawFile]:
    """A copy at version `seen`, and no object downloaded since."""
    raw = RawFile(tmp_path / "copy")
    walker = Walker(ahead, raw)
    walker.move(Version(seen))
    store.served = 0
    return walker, raw


def test_a_walk_downloads_nothing_that_was_fetched_ahead(tmp_path: Path) -> None:
    store = a_chain()
    ahead = FetchAhead(store)
    walker, raw = walked(tmp_path, store, ahead)
    ahead.begin(Version(1), Version(4))
    ahead.wait()
    assert store.served == 3
    for version in (4, 2, 3):  # back and forth over the same deltas
        walker.move(Version(version))
        assert held(walker, raw) == store.copies[Version(version)]
    assert store.served == 3
    walker.move(Version(5))
    assert (store.served, held(walker, raw)) == (4, store.copies[Version(5)])


def test_the_next_call_releases_what_is_not_on_its_way() -> None:
    store = a_chain()
    ahead = FetchAhead(store)
    for target, objects in ((3, {2, 3}), (5, {4, 5})):
        ahead.begin(Version(target - 2), Version(target))
        ahead.wait()
        assert set(ahead._held) == {store.manifests[Version(version)].object for version in objects}


def test_memory_is_bounded() -> None:
    store = a_chain()
    sizes = [store.manifests[Version(version)].object_size for version in (2, 3, 4)]
    ahead = FetchAhead(store, most_bytes=sum(sizes[:2]))
    ahead.begin(Version(1), Version(4))
    ahead.wait()
    assert 0 < sum(map(len, ahead._held.values())) <= sum(sizes[:2])


@pytest.mark.parametrize("target", [9, 4])
def test_a_failure_and_a_full_version_change_nothing(tmp_path: Path, target: int) -> None:
    """Version 9 does not exist; version 3 is the base of another chain."""
    store = a_chain(bases=(0, 3))
    ahead = FetchAhead(store)
    walker, raw = walked(tmp_path, store, ahead)
    ahead.begin(Version(1), Version(target))
    ahead.wait()
    assert (store.served, ahead._held) == (0, {})
    walker.move(Version(4))
    assert held(walker, raw) == store.copies[Version(4)]


def test_a_damaged_object_is_not_held(tmp_path: Path) -> None:
    store = a_chain()
    whole = dict(store.objects)
    broken = store.manifests[Version(3)].object
    store.objects[broken] = bytes([store.objects[broken][0] ^ 1]) + store.objects[broken][1:]
    ahead = FetchAhead(store)
    walker, raw = walked(tmp_path, store, ahead)
    ahead.begin(Version(1), Version(4))
    ahead.wait()
    assert broken not in ahead._held
    store.objects = whole
    walker.move(Version(4))
    assert held(walker, raw) == store.copies[Version(4)]
