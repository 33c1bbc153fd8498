"""Versions whose tensors have another order than those before them."""

from pathlib import Path

import numpy as np

from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ParentWeights, RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Parent
from palimpsest.common.versions import Version
from tests.unit.rollout.test_weights import CANARY, Engine, store, syncing, weight_sync

__all__ = ["store"]


async def test_a_delta_with_another_order_than_its_base_is_loaded_in_its_own_order(
    store: SnapshotClient, tmp_path: Path
) -> None:
    """As that of a learner that continues on another number of ranks: they divide the tensors differently."""
    numbers = np.random.default_rng(0)
    raws = {name: numbers.integers(0, 256, 2**14, dtype=np.uint8) for name in "ab"}
    first, second = (RawTensor(name, "bfloat16", (2**13,), raw) for name, raw in raws.items())
    base = store.put("test", Version(0), [first, second], [CANARY], writer=1)
    held = {name: raw.copy() for name, raw in raws.items()}
    parent = ParentWeights(Parent(Version(0), base.digest), held, ChainCost(base.object_size))
    raws["b"][7] += 1
    delta = store.put("test", Version(1), [second, first], [CANARY], writer=1, parent=parent)
    assert (delta.parent, [entry.name for entry in delta.tensors]) == (parent.parent, ["b", "a"])
    engine = Engine()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights):
        for version in (0, 1):
            weights.announce(Version(version))
            await weights.wait_verified(Version(version))
        assert (tmp_path / "cache" / "weights.raw").read_bytes() == (raws["b"].tobytes() + raws["a"].tobytes())
