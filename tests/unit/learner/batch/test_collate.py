"""Rows of a group: advantages, and the tokens that exceed the staleness bound."""

import msgspec
import numpy as np
import pytest

from palimpsest.common.messages import Ending, TrajectoryFinished
from palimpsest.services.learner.batch.collate import to_rows
from tests.records.builders import a_finished, a_segment


def a_group() -> list[TrajectoryFinished]:
    """Versions 3 and 5, 5 alone, 3 alone; rewards 1, 0, 0."""
    mixed, young, old = (a_segment(2, 4, 3), a_segment(4, 6, 5)), (a_segment(2, 6, 5),), (a_segment(2, 6, 3),)
    return [a_finished(0, s, segments=part, reward=float(s == 0)) for s, part in enumerate((mixed, young, old))]


def test_tokens_below_the_lowest_version_are_untrainable() -> None:
    mixed, young, old = to_rows(a_group(), "dr_grpo", lowest=5)
    assert mixed.versions.tolist() == [-1, -1, -1, -1, 5, 5, -1, -1]
    assert mixed.behavior.tolist() == [0, 0, 0, 0, -0.5, -0.5, 0, 0]
    assert (mixed.versions.dtype, mixed.behavior.dtype) == (np.int32, np.float32)
    assert (mixed.trainable, young.trainable, old.trainable) == (2, 4, 0)
    assert to_rows(a_group(), "dr_grpo", lowest=-1)[0].versions.tolist() == [-1, -1, 3, 3, 5, 5, -1, -1]


def test_a_trajectory_that_reached_a_limit_is_truncated() -> None:
    """GAE continues with the value of its last state (docs/algorithms/gae.md)."""
    mixed, young, old = a_group()
    limited = msgspec.structs.replace(young, ending=Ending.TRUNCATED)
    assert [row.truncated for row in to_rows([mixed, limited, old], "gae", lowest=3)] == [False, True, False]


def test_a_trajectory_that_is_too_old_counts_in_the_baseline_of_its_siblings() -> None:
    mixed, young, old = a_group()
    rows = to_rows([mixed, young], "dr_grpo", lowest=5, baseline=[old])
    assert [row.trajectory for row in rows] == ["g000000/0", "g000000/1"]
    assert [row.advantage for row in rows] == pytest.approx([2 / 3, -1 / 3])
    (alone,) = to_rows([mixed], "rloo", lowest=5, baseline=[old])
    assert alone.advantage == 1.0, "one trajectory with tokens inside the bound has a baseline"
