"""The evidence of an audit: the records, lines, checkpoints and versions of a run, as plain values. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from palimpsest.common.staleness_bound import StalenessBound
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState

FINISHED = "finished"
"""Value of `how` of a finished trajectory; every other value is a drop reason."""


class Kind(StrEnum):
    """The kinds of inconsistencies."""

    TRAINED_TWICE = "trained_twice"
    TRAINED_UNOFFERED = "trained_unoffered"
    TRAINED_WITHOUT_RECORD = "trained_without_record"
    """The log has no record of a trained trajectory."""
    TASK_CHANGED = "task_changed"
    """A group was offered with different tasks."""
    SUMS = "sums"
    """offered = trained + dropped + dead-lettered + pending does not hold."""
    RECOUNT = "recount"
    """The ledger differs from a recount of log and history."""
    UNEXPLAINED = "unexplained"
    """The ledger counts ends that have no record on the log."""
    UNRESOLVED = "unresolved"
    """A record below the checkpoint's offsets whose trajectory has no end."""
    LETTERS_MISSING = "letters_missing"
    """The ledger counts more dead-lettered records than there are dead letters."""
    HISTORY_ORDER = "history_order"
    HISTORY_DAMAGED = "history_damaged"
    HISTORY_TAIL = "history_tail"
    """Lines after the checkpoint that no learner can have written."""
    STALENESS = "staleness"
    """A staleness above the bound, or negative."""
    OFFSET_OUTSIDE = "offset_outside"
    """The checkpoint's offset is outside the log."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    CHECKPOINT_UNKNOWN = "checkpoint_unknown"
    """A checkpoint that the store never accepted and that is newer than the accepted ones."""
    VERSION_MISSING = "version_missing"
    VERSION_DIGEST = "version_digest"
    """The weights differ from the announced ones."""
    VERSION_DAMAGED = "version_damaged"
    ANNOUNCED_TWICE = "announced_twice"
    """A version was announced with different digests."""
    OBJECT_DAMAGED = "object_damaged"
    FENCED_WRITER = "fenced_writer"
    """A replaced learner wrote after its successor started."""
    STORE_DAMAGED = "store_damaged"
    EVALUATION_TRAINED = "evaluation_trained"
    """A trajectory of an evaluation was trained on."""
    EVALUATION = "evaluation"
    """The result of an evaluation differs from the offers and records on the log."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One inconsistency. The sentence has the place and a remedy."""

    kind: Kind
    sentence: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A group on topic `tasks`."""

    group: str
    index: int
    samples: int
    task: tuple[str, int]
    """Environment and task seed."""


@dataclass(frozen=True, slots=True)
class LoggedRecord:
    """A record on topic `trajectories`. `trajectory` is empty if the record is unreadable or of another run."""

    partition: int
    offset: int
    trajectory: str = ""
    how: str = ""
    """FINISHED or a drop reason."""
    oldest: int | None = None
    """Lowest version among its tokens; None if no token was sampled."""
    newest: int | None = None
    sound: bool = True
    """Whether the record is valid for a learner."""
    tokens: Mapping[int, int] = field(default_factory=dict)
    """Version -> number of tokens that it sampled."""


@dataclass(frozen=True, slots=True)
class EvaluationOffer:
    """A task of an evaluation, on topic `tasks`."""

    group: str
    version: int
    environment: str
    samples: int


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """A trajectory of an evaluation, on topic `trajectories`."""

    trajectory: str
    sound: bool = False
    """Whether it is finished and valid for a learner."""
    success: bool = False
    versions: tuple[int, ...] = ()
    """Versions of its tokens."""


@dataclass(frozen=True, slots=True)
class EvaluationLine:
    """An evaluation by evaluations.jsonl."""

    version: int
    offered: int
    scored: int
    dropped: Mapping[str, int]
    dead_lettered: int
    estimates: Mapping[str, tuple[float | None, float | None]]
    """Environment -> avg@k, pass@k."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter of topic `trajectories`."""

    partition: int
    offset: int
    """Offset of the dead-lettered record."""
    trajectory: str
    """The id in the worker's header."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A version that the learner announced, or that the worker `by` applied."""

    version: Version
    digest: str
    by: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first offset of a partition, and the offset after its last record."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class LogContents:
    """The records of the log."""

    offers: tuple[Offer, ...] = ()
    arrivals: tuple[LoggedRecord, ...] = ()
    evaluation_offers: tuple[EvaluationOffer, ...] = ()
    evaluation_records: tuple[EvaluationRecord, ...] = ()
    letters: tuple[Letter, ...] = ()
    announced: tuple[Announced, ...] = ()
    """Versions that the learner announced, in order."""
    applied: tuple[Announced, ...] = ()
    """Versions that workers verified and applied."""
    finished: bool = False
    """Whether the learner published the end of the run."""
    staleness_changes: tuple[tuple[int, int], ...] = ()
    """Changes of learner.max_staleness: version at which it was changed, new number."""
    bounds: Mapping[str, Mapping[int, Bounds]] = field(default_factory=dict)
    """Topic -> partition -> bounds."""
    causes: Mapping[str, int] = field(default_factory=dict)
    """Cause -> number of dead-lettered records of all topics; each record counts once."""

    def cut(self, topic: str) -> bool:
        """Whether retention has removed the first records of the topic."""
        return any(bounds.first > 0 for bounds in self.bounds.get(topic, {}).values())


@dataclass(frozen=True, slots=True)
class Line:
    """A trained version by history.jsonl."""

    version: int
    published: int
    trained: tuple[str, ...]
    """Trajectory ids."""
    batch: int
    staleness: tuple[int, int]
    """Lowest and highest staleness of its tokens, in versions."""
    counts: Mapping[str, int]
    """The ledger's counts after the version: offered, trained, dropped, dead_lettered, pending."""
    too_old: int | None = None
    """Number of tokens of the batch that were masked because they exceeded the staleness bound. None: a line of an
    older release."""


@dataclass(frozen=True, slots=True)
class AuditedCheckpoint:
    """A checkpoint that the store accepted and that is intact."""

    name: str
    version: Version
    writer: int
    digest: str
    """Digest of its announced weights."""
    trained_versions: int
    ledger: LedgerState
    offsets: Mapping[int, int]
    task_offsets: Mapping[int, int]
    evaluated: tuple[int, ...] = ()
    """Versions whose evaluation had ended or was abandoned."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A version in the store."""

    version: Version
    digest: str
    writer: int
    bytes: int
    object: str = ""
    trouble: str = ""
    """The fault of its object; empty if it has none or was not examined."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of one run."""

    run: str
    samples: int
    """Samples of a group whose offer is not on the log."""
    max_staleness: int
    """Of the run file."""
    every: int
    """Number of versions between checkpoints."""
    log: LogContents = LogContents()
    checkpoint: AuditedCheckpoint | None = None
    """The checkpoint in force: the newest intact one."""
    lines: tuple[Line, ...] = ()
    """History lines that the checkpoint includes."""
    tail: tuple[Line, ...] = ()
    """History lines after the checkpoint; all lines if there is no checkpoint."""
    evaluations: tuple[EvaluationLine, ...] = ()
    damaged: tuple[str, ...] = ()
    """One sentence for each damaged checkpoint that is newer than the one in force."""
    stored: tuple[Stored, ...] = ()
    leases: Mapping[str, int] = field(default_factory=dict)
    epoch: int = 0
    """Epoch of the newest writer; 0 if none was issued."""
    commits: tuple[tuple[int, int], ...] = ()
    """Version and writer of each accepted checkpoint."""
    faults: tuple[Finding, ...] = ()
    """Findings about files that could not be read."""
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> StalenessBound:
        """The staleness bound of each version, with the changes that people made."""
        return StalenessBound(self.max_staleness, self.log.staleness_changes)
