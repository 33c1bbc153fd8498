"""A copy that moves along deltas: equal to full copies on random walks; no damaged or swapped object is served."""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from palimpsest.common.snapshots import chain, frames, slices
from palimpsest.common.snapshots.chain import ChainCost, ancestors, way
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.frames import Hashed, RawTensor
from palimpsest.common.snapshots.manifest import SCHEMA, Damaged, Manifest, Parent, TensorEntry, version_digest
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import Version

SHAPES = {"a": (40, 8), "b": (7,), "none": (0, 3)}


@dataclass
class Versions:
    """a VersionSource in memory, which also keeps a full copy of each version."""

    manifests: dict[Version, Manifest] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    copies: dict[Version, bytes] = field(default_factory=dict)
    served: int = 0
    verified: bool = True

    def add(self, version: int, weights: dict[str, np.ndarray], parent: int | None) -> Manifest:
        """Store weights, as a delta to the parent if there is one."""
        file = io.BytesIO()
        old = None
        if parent is not None:
            old = self.split(self.copies[Version(parent)])
        tensors = [RawTensor(name, "bfloat16", SHAPES[name], raw) for name, raw in weights.items()]
        encoded = encode_version(tensors, old, file, level=1, threads=1)
        manifest = Manifest(
            schema=SCHEMA, run="t", writer=1, version=Version(version), digest=version_digest(encoded.entries),
            encoding="slices" if parent is None else "delta", object=encoded.digest, object_size=encoded.size,
            tensors=tuple(encoded.entries), canaries=(), encodings=dict(encoded.kinds),
            parent=None if parent is None else Parent(Version(parent), self.manifests[Version(parent)].digest),
        )  # fmt: skip
        self.manifests[Version(version)], self.objects[encoded.digest] = manifest, file.getvalue()
        self.copies[Version(version)] = b"".join(raw.tobytes() for raw in weights.values())
        return manifest

    def sweep(self, lowest: Version) -> None:
        """Remove the versions below that no other depends on."""
        stay = {version for version in self.manifests if version >= lowest}
        stay |= ancestors(stay, lambda v: self.manifests[v].parent if v in self.manifests else None)
        self.manifests = {version: manifest for version, manifest in self.manifests.items() if version in stay}

    @staticmethod
    def split(copy: bytes) -> dict[str, np.ndarray]:
        found, start = {}, 0
        for name, shape in SHAPES.items():
            size = 2 * int(np.prod(shape))
            found[name] = np.frombuffer(copy, np.uint8)[start : start + size].copy()
            start += size
        return found

    def manifest(self, version: Version) -> Manifest:
        if version not in self.manifests:
            raise VersionMissing(f"{version}")
        return self.manifests[version]

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        if manifest.object not in self.objects:
            raise VersionMissing(f"{manifest.version}")
        self.served += 1
        body = self.objects[manifest.object]
        if self.verified:
            Hashed(iter([body]), manifest).verify()
        yield iter([body])


def stepped(weights: dict[str, np.ndarray], numbers: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    moved = {}
    for name, raw in weights.items():
        after = raw.copy().view(np.uint16)
        changed = numbers.random(len(after)) < share
        after[changed] += numbers.choice(np.array([1, 65535], np.uint16), changed.sum())
        moved[name] = after.view(np.uint8)
    return moved


def start(seed: int) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return {name: numbers.integers(0, 256, 2 * int(np.prod(shape)), dtype=np.uint8) for name, shape in SHAPES.items()}


def a_chain(length: int = 6, bases: tuple[int, ...] = (0,)) -> Versions:
    store, weights, numbers = Versions(), start(0), np.random.default_rng(1)
    for version in range(length):
        store.add(version, weights, None if version in bases else version - 1)
        weights = stepped(weights, numbers, 0.1)
    return store


def held(walker: Walker, raw: RawFile) -> bytes:
    assert walker.manifest is not None
    return b"".join(tensor.raw.tobytes() for tensor in raw.tensors(walker.manifest))


@pytest.mark.parametrize(
    "seeds",
    [range(50), *(pytest.param(range(s, s + 50), marks=pytest.mark.long) for s in range(50, 500, 50))],
    ids=str,
)
def test_random_walks_and_faults_hold_what_full_copies_hold(seeds: range, tmp_path: Path) -> None:
    """Publish, sweep, walk, damage and lose objects at random: a walk ends at the exact bytes or is refused."""
    refused = moved = 0
    for seed in seeds:
        chances, numbers = random.Random(seed), np.random.default_rng(seed)
        store, weights, raw = Versions(), start(seed), RawFile(tmp_path / f"{seed}")
        walker, newest, cost = Walker(store, raw), -1, ChainCost(0)
        for _ in range(30):
            match chances.choice(["publish", "publish", "walk", "walk", "walk", "sweep", "flip", "lose"]):
                case "publish":
                    weights = stepped(weights, numbers, chances.choice([0.0, 0.01, 0.3, 1.0]))
                    parent = newest if Version(newest) in store.manifests and chances.random() < 0.9 else None
                    manifest = store.add(newest + 1, weights, parent)
                    cost, newest = cost.after(manifest), newest + 1
                case "sweep" if newest > 0:
                    store.sweep(Version(chances.randint(0, newest)))
                case "flip" if store.objects:
                    name = chances.choice(sorted(store.objects))
                    body = bytearray(store.objects[name])
                    body[chances.randrange(len(body))] ^= 1 << chances.randrange(8)
                    store.objects[name] = bytes(body)
                case "lose" if store.objects and chances.random() < 0.2:
                    del store.objects[chances.choice(sorted(store.objects))]
                case "walk" if newest >= 0:
                    version = Version(chances.randint(0, newest))
                    try:
                        walker.move(version)
                    except (Damaged, VersionMissing):
                        refused += 1
                    else:
                        moved += 1
                        assert walker.manifest is not None
                        assert walker.manifest.version == version
                    if walker.manifest is not None:
                        assert held(walker, raw) == store.copies[walker.manifest.version]
    assert moved > 50
    assert refused > 5


def test_a_walk_applies_only_what_lies_between(tmp_path: Path) -> None:
    store = a_chain()
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    assert walker.move(Version(3)).hops == 4
    for version, hops in ((5, 2), (1, 4), (1, 0), (2, 1)):
        moved = walker.move(Version(version))
        assert (moved.hops, held(walker, raw)) == (hops, store.copies[Version(version)])


def test_a_walk_to_another_chain_starts_from_its_base(tmp_path: Path) -> None:
    store = a_chain(6, bases=(0, 3))
    walker = Walker(store, RawFile(tmp_path / "w"))
    walker.move(Version(2))
    assert [(hop.manifest.version, hop.back) for hop in way(Version(2), Version(5), store.manifest)] == [
        (3, False), (4, False), (5, False)
    ]  # fmt: skip
    assert walker.move(Version(5)).hops == 3


def swap(store: Versions) -> None:
    """The deltas of two versions are exchanged, each under the other's manifest."""
    first, second = store.manifests[Version(3)], store.manifests[Version(4)]
    bodies = store.objects[first.object], store.objects[second.object]
    store.objects[first.object], store.objects[second.object] = bodies[1], bodies[0]


def other_parent(store: Versions) -> None:
    """A manifest names another parent than the one that its delta was made from."""
    manifest = store.manifests[Version(4)]
    store.manifests[Version(4)] = replace(manifest, parent=Parent(Version(2), store.manifests[Version(2)].digest))


def other_digest(store: Versions) -> None:
    manifest = store.manifests[Version(4)]
    store.manifests[Version(4)] = replace(manifest, parent=Parent(Version(3), "0" * 64))


def flip(store: Versions) -> None:
    name = store.manifests[Version(4)].object
    body = bytearray(store.objects[name])
    body[-1] ^= 1
    store.objects[name] = bytes(body)


def torn(store: Versions) -> None:
    name = store.manifests[Version(4)].object
    store.objects[name] = store.objects[name][:-5]


def lost_object(store: Versions) -> None:
    del store.objects[store.manifests[Version(4)].object]


def lost_link(store: Versions) -> None:
    del store.manifests[Version(4)]


FAULTS = [swap, other_parent, other_digest, flip, torn, lost_object, lost_link]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("begin", [None, 3])
def test_a_fault_on_the_way_is_refused(fault: Callable[[Versions], None], begin: int | None, tmp_path: Path) -> None:
    store = a_chain()
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    if begin is not None:
        walker.move(Version(begin))
    fault(store)
    with pytest.raises((Damaged, VersionMissing)):
        walker.move(Version(5))
    assert walker.manifest is None or held(walker, raw) == store.copies[Version(3)]


def forge(store: Versions) -> None:
    """Version 3 names the delta of another run: a whole object, of the same tensors, that leads elsewhere."""
    other, weights, numbers = Versions(), start(0), np.random.default_rng(2)
    for version in range(4):
        other.add(version, weights, version - 1 if version else None)
        weights = stepped(weights, numbers, 0.1)
    true, false = store.manifests[Version(3)], other.manifests[Version(3)]
    entries = tuple(
        replace(entry, start=its.start, length=its.length)
        for entry, its in zip(true.tensors, false.tensors, strict=True)
    )
    store.objects |= other.objects
    store.manifests[Version(3)] = replace(true, tensors=entries, object=false.object, object_size=false.object_size)


def test_the_digests_of_the_tensors_refuse_another_delta_whose_own_digest_is_right(tmp_path: Path) -> None:
    store = a_chain()
    forge(store)
    with pytest.raises(Damaged, match="the digest of its bytes is different"):
        Walker(store, RawFile(tmp_path / "w")).move(Version(3))


def test_without_the_digests_of_the_tensors_it_would_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_chain()
    monkeypatch.setattr(frames, "verify", lambda *_: None)
    forge(store)
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    walker.move(Version(3))
    assert held(walker, raw) != store.copies[Version(3)]


def test_without_the_digest_of_the_object_a_flipped_bit_reaches_the_weights(tmp_path: Path) -> None:
    """The digests of the tensors are the second guard."""
    store = a_chain()
    store.verified = False
    flip(store)
    with pytest.raises(Damaged, match="tensor"):
        Walker(store, RawFile(tmp_path / "w")).move(Version(4))


def test_without_the_check_of_parents_a_delta_is_applied_to_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_chain()
    other_parent(store)
    monkeypatch.setattr(frames, "verify", lambda *_: None)
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    walker.move(Version(2))
    walker.move(Version(4))
    assert held(walker, raw) != store.copies[Version(4)]


def test_a_copy_that_was_damaged_in_memory_is_loaded_again(tmp_path: Path) -> None:
    store = a_chain()
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    walker.move(Version(2))
    with raw.editing(store.manifests[Version(2)].tensors[0]) as place:
        place[0] ^= 1
    walker.move(Version(3))
    assert held(walker, raw) == store.copies[Version(3)]


def test_a_version_with_dense_slices_cannot_be_left_backwards(tmp_path: Path) -> None:
    store = Versions()
    store.add(0, start(0), None)
    wide = {name: np.repeat(np.uint8(7), len(raw)) for name, raw in start(0).items()}  # compresses to nothing
    assert not store.add(1, wide, 0).reversible
    walker = Walker(store, raw := RawFile(tmp_path / "w"))
    walker.move(Version(1))
    assert walker.move(Version(0)).hops == 1
    assert held(walker, raw) == store.copies[Version(0)]


def test_chains_end_by_cost() -> None:
    assert not ChainCost(base=100, deltas=10, links=chain.LINKS).admits(1)
    assert ChainCost(base=100, deltas=100, links=3).admits(80)
    assert not ChainCost(base=100, deltas=150, links=3).admits(80)


class Part:
    """The numbers of each tensor from one share of its length to another."""

    def __init__(self, first: float, last: float) -> None:
        self.bounds = {
            name: (int(first * np.prod(shape)), int(last * np.prod(shape))) for name, shape in SHAPES.items()
        }
        self.raw = {name: np.zeros(2 * (stop - start), np.uint8) for name, (start, stop) in self.bounds.items()}

    def held(self, entry: TensorEntry) -> tuple[int, int]:
        return self.bounds[entry.name]

    def load(self, tensors: Iterator[RawTensor], _manifest: Manifest) -> None:
        for tensor in tensors:
            start, stop = self.bounds[tensor.name]
            self.raw[tensor.name][:] = tensor.raw[2 * start : 2 * stop]

    @contextmanager
    def editing(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        yield self.raw[entry.name]


@pytest.mark.parametrize("slice_bytes", [14, 4 << 20])
def test_parts_that_walk_alone_hold_the_versions_together(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", slice_bytes)  # slices of seven numbers: parts begin inside them
    store = a_chain(6, bases=(0, 3))
    parts = [Part(0.0, 0.37), Part(0.37, 0.37), Part(0.37, 1.0)]
    walkers = [Walker(store, part, held=part.held) for part in parts]
    for version in map(Version, (2, 0, 1, 5, 4, 2)):
        for walker in walkers:
            walker.move(version)
        whole = store.split(store.copies[version])
        for name, raw in whole.items():
            assert np.array_equal(np.concatenate([part.raw[name] for part in parts]), raw)
