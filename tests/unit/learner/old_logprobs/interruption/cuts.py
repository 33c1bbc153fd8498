"""Cut requests on a log, old log-probs of a record, and versions, for the tests of the coordinator."""

from palimpsest.common.messages import (
    CONTROL,
    CutRequested,
    SegmentFlushed,
)
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.eager_scorer import as_row
from tests.learner_parts.interruption import (
    Learner,
    Log,
    digest,
)

V0, V1 = Version(0), Version(1)


def requests(log: Log) -> list[CutRequested]:
    return [m for m in log.messages(CONTROL) if isinstance(m, CutRequested)]


def known(learner: Learner, record: SegmentFlushed, version: int = 0) -> list[float]:
    """Old log-probs of the record's tokens, nan where a token has none."""
    row = learner.scores.attach(as_row(record), {Version(version): digest(version)})
    assert row.old is not None
    return [float(value) for value in row.old]
