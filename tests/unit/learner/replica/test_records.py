"""Records that no model can score."""

import pytest

from palimpsest.common.arrays import pack_int32
from palimpsest.common.messages import (
    TrajectoryFinished,
)
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.services.learner.replica.records import to_rows
from tests.records.builders import a_finished, a_segment

pytestmark = pytest.mark.thorough

BAD: dict[str, dict[str, object]] = {
    "no tokens": {"tokens": b""},
    "half a token": {"tokens": b"\0" * 30},
    "a negative token": {"tokens": pack_int32([1, -2, 3, 4, 5, 6, 7, 8])},
    "a token beyond the vocabulary": {"tokens": pack_int32([1, 2, 3, 4, 5, 6, 7, 300])},
    "a segment beyond the tokens": {"segments": (a_segment(6, 9, 0),)},
    "the first token sampled": {"segments": (a_segment(0, 2, 0),)},
    "a negative version": {"segments": (a_segment(1, 2, -3),)},
    "a version beyond int32": {"segments": (a_segment(1, 2, 1 << 31),)},
    "a temperature of 0": {"temperature": 0.0},
    "a temperature of nan": {"temperature": float("nan")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_record_that_no_model_can_score_is_refused(bad: dict[str, object]) -> None:
    good = a_finished(0, 0)
    assert list(to_rows(good, vocabulary=300)) == [0]
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    with pytest.raises(MalformedTrajectory):
        to_rows(TrajectoryFinished(**fields | bad), vocabulary=300)
