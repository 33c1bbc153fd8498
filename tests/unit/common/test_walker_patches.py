"""A hop that patches and compares each tensor in one pass."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from palimpsest.common.snapshots import frames, slices
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import Version
from tests.unit.common.test_walker import a_chain, forge, held


def test_a_tensor_in_several_slices_is_patched_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (slices, frames):
        monkeypatch.setattr(module, "SLICE_BYTES", 64)
    store = a_chain(3)
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    for version in (2, 0, 1):
        walker.move(Version(version))
        assert held(walker, raw) == store.copies[Version(version)]
    forge(longer := a_chain(4))
    with pytest.raises(Damaged, match="the digest of its bytes is different"):
        Walker(longer, RawFile(tmp_path / "v")).move(Version(3))


def test_a_hop_to_a_manifest_with_other_tensors_is_refused_before_the_copy_changes(tmp_path: Path) -> None:
    """Each patched tensor needs its digest; the walker then loads the base."""
    store = a_chain(2)
    manifest = store.manifests[Version(0)]
    store.manifests[Version(0)] = replace(manifest, tensors=manifest.tensors[:-1])
    walker = Walker(store, RawFile(tmp_path / "w"))
    walker.manifest = store.manifests[Version(1)]  # the copy holds nothing: a change of it would fail
    assert walker.move(Version(0)).hops == 1
    assert store.served == 2


@pytest.mark.parametrize("place", [0, 63, 64, 350, 639])
def test_a_flipped_bit_in_any_slice_of_a_large_tensor_is_found(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest that follows the slices covers every byte, also those that the delta does not change."""
    for module in (slices, frames):
        monkeypatch.setattr(module, "SLICE_BYTES", 64)
    store = a_chain(4)
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    walker.move(Version(2))
    with raw.editing(store.manifests[Version(2)].tensors[0]) as own:
        own[place] ^= 1
    assert walker.move(Version(3)).hops == 4  # from the base
    assert held(walker, raw) == store.copies[Version(3)]
