"""The version with which a learner starts again: that of the store, or a refusal that names the cause."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import CONTROL
from palimpsest.common.snapshots.client import SnapshotClient, VersionConflict
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.publishing.publisher import Publisher
from tests.servers.stored_weights import a_tensor


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    with closing(SqliteBus(tmp_path / "bus.sqlite")) as opened:
        opened.create_topics({CONTROL: 1})
        yield opened


def started(bus: SqliteBus, store: SnapshotClient, *, seed: int) -> Publisher:
    """The publisher of a learner that has just begun, whose model has the weights of this seed."""
    (writer := Writer(store)).begin()

    def put(version: Version, canaries: Any, *, writer: int) -> Manifest:
        return store.put("r", version, [a_tensor("w", "bfloat16", (8,), seed)], canaries, writer=writer)

    weights: Any = SimpleNamespace(copy=lambda: None, store=put)
    canaries: Any = SimpleNamespace(made=tuple)
    return Publisher(bus, store, writer, torch.nn.Module(), canaries, run="r", weights=weights)


def test_a_learner_without_a_checkpoint_publishes_the_same_version_0_again(
    bus: SqliteBus, store: SnapshotClient
) -> None:
    first, again = (started(bus, store, seed=1).republish(Version(0), now=0.0) for _ in range(2))
    assert (first.version, first.digest) == (again.version, again.digest)


def test_changed_starting_files_are_named_as_the_cause(bus: SqliteBus, store: SnapshotClient) -> None:
    started(bus, store, seed=1).republish(Version(0), now=0.0)
    with pytest.raises(UserError, match=r"learner\.lora\.start: one of them was changed .* Restore the files") as error:
        started(bus, store, seed=2).republish(Version(0), now=0.0)
    assert error.value.code is ExitCode.CONFIGURATION
    assert "version 0 already exists with digest" in str(error.value)


def test_with_a_checkpoint_other_weights_are_a_fault(bus: SqliteBus, store: SnapshotClient) -> None:
    started(bus, store, seed=1).republish(Version(0), now=0.0)
    second = started(bus, store, seed=2)
    second._writer.commit(Version(0), "0" * 64)
    with pytest.raises(VersionConflict):
        second.republish(Version(0), now=0.0)
