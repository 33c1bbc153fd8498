"""The learner's lease on the versions that it may still need."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version
from palimpsest.services.learner.publishing.publisher import LEASE, RENEW_S, Publisher


def test_a_learner_that_trains_no_version_takes_its_lease_again_every_hour(store: SnapshotClient) -> None:
    unused, now = SimpleNamespace(), [0.0]
    arguments: Any = (unused, store, unused, torch.nn.Module(), unused)
    publisher = Publisher(*arguments, run="r", clock=lambda: now[0])
    publisher.keep_from(Version(7))
    for hours, lowest in ((0.5, 0), (1.01, 7), (1.9, 0), (2.1, 7)):
        store.lease(LEASE, Version(0))  # another lease, which the next one replaces
        now[0] = hours * RENEW_S
        publisher.renew_lease()
        assert held(store) == {LEASE: lowest}


def held(store: SnapshotClient) -> dict[str, int]:
    leases: dict[str, int] = store.request("GET", "/v1/status")["leases"]
    return leases


@pytest.mark.parametrize(("lowest", "kept"), [(-3, 0), (7, 7)])
def test_no_lease_is_below_version_0(store: SnapshotClient, lowest: int, kept: int) -> None:
    unused: Any = SimpleNamespace()
    Publisher(unused, store, unused, torch.nn.Module(), unused, run="r").keep_from(Version(lowest))
    assert held(store) == {LEASE: kept}
