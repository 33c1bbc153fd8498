"""The state of the evaluations of a run, for a checkpoint. Needs no torch."""

from msgspec import Struct, field

from palimpsest.common.versions import Version

SCORED = "scored"
DEAD_LETTERED = "dead_lettered"
NOTHING = Version(-1)


class SampleEnd(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """How one trajectory ended."""

    how: str
    """SCORED, DEAD_LETTERED or a drop reason."""
    success: bool = False
    reward: float = 0.0


class BestVersion(Struct, frozen=True, forbid_unknown_fields=True):
    """The version with the highest mean of avg@k over environments; the earlier one of equal ones."""

    version: Version
    score: float


class EvaluationState(Struct, frozen=True, forbid_unknown_fields=True):
    """All evaluations so far."""

    trained: int = -1
    """Trained versions at the start of the newest evaluation; -1 before the first."""
    version: Version = NOTHING
    """Version under evaluation; NOTHING between evaluations."""
    ends: dict[str, SampleEnd] = field(default_factory=dict)
    """Trajectory -> its end, of the evaluation in progress. The log is not read again for these."""
    evaluated: tuple[Version, ...] = ()
    """Versions whose evaluation has ended."""
    file_bytes: int = 0
    """Length of evaluations.jsonl."""
    best: BestVersion | None = None
