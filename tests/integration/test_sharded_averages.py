"""Averages of a policy that is split over two ranks are those of a replicated one, and continue on one rank."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.learner_parts.models import build
from tests.processes.averages_on_ranks import KINDS
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Kind -> results of two ranks, then of one rank that has read their checkpoint."""
    folder = tmp_path_factory.mktemp("averages")
    for number, what in ((2, "write"), (1, "read")):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
        done = subprocess.run(
            [sys.executable, *launcher, "tests.processes.averages_on_ranks", str(build(tied=True)), str(folder), what],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
    files = ("write 0", "write 1", "read 0")
    return {kind: [torch.load(folder / f"{kind} {file}.pt", weights_only=False) for file in files] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_values_are_equal_bit_for_bit(saved: Any, kind: str) -> None:
    expected = saved[kind][0]["replicated"]
    for rank in saved[kind]:
        for name in ("means", "scores"):
            assert len(rank["sharded"][name]) == len(expected[name])
            assert all(torch.equal(a, b) for a, b in zip(rank["sharded"][name], expected[name], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_the_same_measures(saved: Any, kind: str) -> None:
    expected = saved[kind][0]["replicated"]["gauges"]
    assert saved[kind][0]["sharded"]["gauges"] == saved[kind][1]["sharded"]["gauges"]
    for rank in saved[kind]:
        assert rank["sharded"]["gauges"] == pytest.approx(expected, rel=1e-9)  # norms, added in another order
    assert expected["ewma_distance"] > 0


def test_a_guarded_reset_takes_the_stored_version(saved: Any) -> None:
    """The mean staleness is 1, so the average restarts with version 2."""
    gauges = saved["a guarded reset"][0]["sharded"]["gauges"]
    assert (gauges["ewma_resets"], gauges["ewma_age"], gauges["ewma_weight"]) == (1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_half_of_the_means(saved: Any, kind: str) -> None:
    first, second, alone = (rank["bytes"] for rank in saved[kind])
    assert first + second == alone
    assert max(first, second) < 0.51 * alone
