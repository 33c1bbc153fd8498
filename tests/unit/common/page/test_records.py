"""Recorded batches, as the page and the report read them."""

from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.page import records
from tests.records.batches import TRAJECTORIES, write_batch


def test_a_trajectory_has_its_tokens_versions_log_probs_and_causes(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3)
    found = records.tokens(tmp_path, 3, 1, 100, str)
    assert (found.trajectory, found.now, found.length) == (TRAJECTORIES[1], 3, 5)
    assert found.text == ["10", "11", "12", "13", "14"]
    assert found.versions == [-1, 2, 3, 3, 3]
    assert found.behavior == [0.0, -1.0, -1.0, -1.0, -1.0]
    assert found.proximal[:3] == [None, -0.75, -1.0312]
    assert found.current[1] == -0.625
    assert found.exact == [False, True, True, True, True]
    assert found.removed == [[], ["band_high"], ["band_high", "clip_low"], [], []]


def test_a_reply_is_cut_at_its_limit(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3)
    found = records.tokens(tmp_path, 3, 0, 2, str)
    assert (found.length, found.text, len(found.removed)) == (6, ["10", "11"], 2)
    assert len(records.overview(tmp_path, 3, 1)) == 1


def test_the_overview_counts_removed_tokens(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3)
    assert [(one.row, one.trajectory, one.tokens, one.removed) for one in records.overview(tmp_path, 3, 10)] == [
        (0, TRAJECTORIES[0], 6, 2),
        (1, TRAJECTORIES[1], 5, 2),
    ]


def test_a_batch_without_causes_does_not_count_its_tokens_as_kept(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3, causes=False)
    assert records.overview(tmp_path, 3, 10)[0].removed is None
    assert records.tokens(tmp_path, 3, 0, 2, str).removed == [None, None]


def test_the_newest_batches_are_listed(tmp_path: Path) -> None:
    assert records.recorded(tmp_path, 2) == []
    for version in (1, 2, 3):
        write_batch(tmp_path, now=version)
    (tmp_path / ".00000004.npz.7.partial").touch()
    assert records.recorded(tmp_path, 2) == [2, 3]


def test_a_missing_or_damaged_batch_and_a_missing_row_are_errors(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3)
    (tmp_path / "00000004.npz").write_bytes(b"damaged")
    for version in (2, 4):
        with pytest.raises(FileNotFoundError):
            records.overview(tmp_path, version, 10)
    with pytest.raises(IndexError):
        records.tokens(tmp_path, 3, 2, 10, str)


def test_a_batch_with_damaged_or_missing_arrays_is_damaged(tmp_path: Path) -> None:
    write_batch(tmp_path, now=3)
    path = tmp_path / "00000003.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("behavior")}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileNotFoundError):
        records.overview(tmp_path, 3, 10)
    np.savez(path, **arrays)
    with pytest.raises(FileNotFoundError):
        records.tokens(tmp_path, 3, 0, 10, str)
