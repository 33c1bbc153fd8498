"""Chains replaced near the limit of bytes: the same weights, fewer bytes, and nothing lost when something fails."""

import io
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from msgspec.structs import replace

from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.frames import RawTensor, decode_tensors
from palimpsest.common.snapshots.manifest import (
    PARTS_SCHEMA,
    SCHEMA,
    Manifest,
    Parent,
    StoredObject,
    parts_digest,
    seal,
    unseal,
    version_digest,
)
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store import rebase
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.rebase import Rebaser, best_gain
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.snapshot_store.catalogs import Clock, objects, opened
from tests.unit.snapshot_store.weights import chunks

NUMBERS = 20_000
LIMIT = 186_000
"""Bytes: a chain of nine versions is above the pressure, and a base has room beside it."""


async def add(catalog: Catalog, version: int, raw: np.ndarray, before: tuple[Manifest, np.ndarray] | None) -> Manifest:
    """Store weights, as a delta if `before` is the version before."""
    file, old = io.BytesIO(), None if before is None else {"w": before[1]}
    encoded = encode_version([RawTensor("w", "bfloat16", (NUMBERS,), raw)], old, file, level=3, threads=1)
    manifest = Manifest(
        schema=SCHEMA, run="t", writer=1, version=Version(version), digest=version_digest(encoded.entries),
        encoding="delta" if before else "slices", object=encoded.digest, object_size=encoded.size,
        tensors=tuple(encoded.entries), canaries=(), encodings=dict(encoded.kinds),
        parent=Parent(before[0].version, before[0].digest) if before else None,
    )  # fmt: skip
    await catalog.put_object(manifest.object, chunks(file.getvalue()), size=encoded.size)
    await catalog.put_version(manifest, seal(manifest))
    return manifest


async def a_chain(folder: Path, limit: int, length: int = 9) -> tuple[Catalog, list[np.ndarray]]:
    """A base and deltas of a third of its bytes; the last version is pinned, all others have no holder."""
    catalog = Catalog(DiskStorage(folder), max_bytes=limit, clock=Clock())
    await catalog.open()
    await catalog.writers.issue("learner")
    numbers = np.random.default_rng(0)
    weights = [numbers.integers(0, 256, 2 * NUMBERS, dtype=np.uint8)]
    before = await add(catalog, 0, weights[0], None)
    for version in range(1, length):
        after = weights[-1].copy().view(np.uint16)
        changed = numbers.random(NUMBERS) < 0.4
        after[changed] += numbers.integers(1, 1000, changed.sum(), dtype=np.uint16)
        weights.append(after.view(np.uint8))
        before = await add(catalog, version, weights[-1], (before, weights[-2]))
    await catalog.pin(Version(length - 1), "best", seconds=None)
    await catalog.lease("learner", Version(length - 1))
    return catalog, weights


async def read(catalog: Catalog, version: int) -> np.ndarray:
    body = await catalog.body(Version(version))
    assert body is not None
    manifest = unseal(body)
    pieces = [piece async for piece in catalog._storage.stream(catalog.object_key(manifest.object))]
    (tensor,) = decode_tensors(iter(pieces), manifest)
    return tensor.raw


async def test_a_chain_near_the_limit_is_replaced_by_a_base_of_the_same_weights(tmp_path: Path) -> None:
    catalog, weights = await a_chain(tmp_path, LIMIT)
    used = catalog.used_bytes
    assert await catalog.sweep() == []
    assert used > rebase.PRESSURE * LIMIT
    digest = catalog.versions[Version(8)].digest
    assert await Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3).relieve() == 8
    assert await catalog.sweep() == list(range(8))
    assert catalog.used_bytes < used / 2
    assert (await read(catalog, 8) == weights[8]).all()
    again = await opened(tmp_path)
    assert again.versions.keys() == {8}
    assert again.versions[Version(8)].digest == digest
    assert again.pins.all().keys() == {8}


async def test_a_delta_in_parts_is_replaced_by_one_object(tmp_path: Path) -> None:
    catalog, weights = await a_chain(tmp_path, LIMIT, length=8)
    after, file, newest = weights[-1].copy(), io.BytesIO(), catalog.versions[Version(7)]
    after.view(np.uint16)[::2] += np.random.default_rng(9).integers(1, 1000, NUMBERS // 2, dtype=np.uint16)
    tensor = RawTensor("w", "bfloat16", (NUMBERS,), after)
    encoded = encode_version([tensor], {"w": weights[-1]}, file, level=3, threads=1)
    halves = [file.getvalue()[: encoded.size // 2], file.getvalue()[encoded.size // 2 :]]
    parts = tuple(StoredObject(blake3(half).hexdigest(), len(half)) for half in halves)
    manifest = replace(
        encoded.manifest("t", Version(8), (), writer=1, parent=Parent(newest.version, newest.digest), adapter=None),
        schema=PARTS_SCHEMA, parts=parts, object=parts_digest(parts),
    )  # fmt: skip
    for each, body in zip(parts, halves, strict=True):
        await catalog.put_object(each.digest, chunks(body), size=each.size)
    await catalog.put_version(manifest, seal(manifest))
    await catalog.unpin(Version(7), "best")
    await catalog.pin(Version(8), "best", seconds=None)
    await catalog.lease("learner", Version(8))
    assert await Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3).relieve() == 8
    (kept,) = catalog.versions[Version(8)].objects
    assert await catalog.sweep() == list(range(8))
    assert objects(tmp_path) == {kept.digest}
    assert (await read(catalog, 8) == after).all()
    assert catalog.versions[Version(8)].digest == manifest.digest


async def test_a_delta_to_the_replaced_version_is_still_accepted(tmp_path: Path) -> None:
    catalog, weights = await a_chain(tmp_path, LIMIT)
    await Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3).relieve()
    await add(catalog, 9, weights[7], (catalog.versions[Version(8)], weights[8]))
    assert catalog.versions[Version(9)].parent is not None


async def test_below_the_pressure_chains_stay(tmp_path: Path) -> None:
    catalog, _ = await a_chain(tmp_path, 10 * LIMIT)
    assert await Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3).relieve() is None
    assert catalog.versions[Version(8)].parent is not None


async def test_a_damaged_chain_stays_as_it_is(tmp_path: Path) -> None:
    catalog, _ = await a_chain(tmp_path, LIMIT)
    path = tmp_path / "objects" / catalog.versions[Version(4)].object
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    before, rebaser = objects(tmp_path), Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3)
    assert await rebaser.relieve() is None
    assert objects(tmp_path) == before
    assert await rebaser.relieve() is None  # not tried again and again


async def test_a_version_that_was_removed_meanwhile_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, _ = await a_chain(tmp_path, LIMIT)
    rebuilt = rebase._rebuild

    def late(*arguments: object) -> Manifest:
        del catalog._manifests[Version(8)]
        return rebuilt(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rebase, "_rebuild", late)
    assert await Rebaser(catalog, DiskStorage(tmp_path, tidy=False), level=3).relieve() is None
    assert Version(8) not in catalog.versions


async def test_other_weights_never_replace_a_version(tmp_path: Path) -> None:
    catalog, _ = await a_chain(tmp_path, LIMIT)
    with pytest.raises(ValueError, match="other weights"):
        await catalog.replace_version(catalog.versions[Version(8)], catalog.versions[Version(7)])


async def test_a_chain_whose_base_costs_more_than_it_frees_stays(tmp_path: Path) -> None:
    catalog, _ = await a_chain(tmp_path, LIMIT, length=3)
    versions = catalog.versions
    assert best_gain(versions, {"learner": Version(2)}, {Version(2)}) is not None
    assert best_gain(versions, {"learner": Version(2)}, {Version(0), Version(2)}) is None
    assert ChainCost(versions[Version(0)].object_size).links == 0
