"""Checks a finished trajectory as a learner does, without a model."""

from palimpsest.common.messages import TrajectoryFinished
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.validation import check_finished

ANY_VOCABULARY = 2**31
"""The audit loads no model: it accepts every token id of 31 bits."""
ANY_VERSION = Version(1 << 62)
"""Newest version passed to the validation of records; the history shows which versions were published by then."""


def check_record(message: TrajectoryFinished) -> None:
    """Raise MalformedTrajectory for a record that a learner rejects."""
    check_finished(message, ANY_VERSION, vocabulary=ANY_VOCABULARY)
