"""What the audit goes by, as plain values: everything a run has left, as it was read. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState

FINISHED = "finished"
"""How a trajectory ended that came back whole; any other way is a drop reason."""


class Kind(StrEnum):
    """What can be wrong with a run."""

    TRAINED_TWICE = "trained_twice"
    TRAINED_UNOFFERED = "trained_unoffered"
    TRAINED_UNHEARD = "trained_unheard"
    """No record of it is on the log."""
    TASK_CHANGED = "task_changed"
    """One group was offered with different tasks."""
    SUMS = "sums"
    """offered = trained + dropped + dead-lettered + pending does not hold."""
    RECOUNT = "recount"
    """The ledger says otherwise than a recount from log and history."""
    UNEXPLAINED = "unexplained"
    """The ledger counts ends of which the log knows nothing."""
    UNRESOLVED = "unresolved"
    """A record that counts as read ended as nothing at all."""
    LETTERS_MISSING = "letters_missing"
    """More was dead-lettered than there are dead letters."""
    HISTORY_ORDER = "history_order"
    HISTORY_DAMAGED = "history_damaged"
    HISTORY_TAIL = "history_tail"
    """Lines beyond the checkpoint that no learner can have left."""
    STALENESS = "staleness"
    """Over the bound, or negative."""
    OFFSET_OUTSIDE = "offset_outside"
    """The checkpoint begins to read where the log has nothing."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    CHECKPOINT_UNKNOWN = "checkpoint_unknown"
    """A checkpoint that the store never took, and newer than those it took."""
    VERSION_MISSING = "version_missing"
    VERSION_DIGEST = "version_digest"
    """Other weights than were announced."""
    VERSION_DAMAGED = "version_damaged"
    ANNOUNCED_TWICE = "announced_twice"
    """With different digests."""
    OBJECT_DAMAGED = "object_damaged"
    FENCED_WRITER = "fenced_writer"
    """A replaced learner wrote after its successor had begun."""
    STORE_DAMAGED = "store_damaged"


@dataclass(frozen=True, slots=True)
class Finding:
    """One inconsistency: a sentence with where and what to do."""

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
    """A record on topic `trajectories`; `trajectory` is empty when it cannot be read or is another run's."""

    partition: int
    offset: int
    trajectory: str = ""
    how: str = ""
    """FINISHED or a drop reason."""
    oldest: int | None = None
    """Lowest version among its tokens; None when nothing was sampled."""
    newest: int | None = None
    sound: bool = True
    """Whether a learner could have used it."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter of topic `trajectories`."""

    partition: int
    offset: int
    """Of the record that it is of."""
    trajectory: str
    """As the worker's header names it."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A version said to stand: by the learner, or by a worker that took it on (`by`)."""

    version: Version
    digest: str
    by: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one partition: the first offset that stands, and the one after the last."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class LogContents:
    """What the log says."""

    offers: tuple[Offer, ...] = ()
    heard: tuple[LoggedRecord, ...] = ()
    letters: tuple[Letter, ...] = ()
    announced: tuple[Announced, ...] = ()
    """By the learner, in order."""
    applied: tuple[Announced, ...] = ()
    """What workers verified and took on."""
    finished: bool = False
    """Whether the learner said that the run is over."""
    bounds: Mapping[str, Mapping[int, Bounds]] = field(default_factory=dict)
    """Topic -> partition -> bounds."""
    causes: Mapping[str, int] = field(default_factory=dict)
    """Cause -> dead letters, of every topic, each record once."""

    def cut(self, topic: str) -> bool:
        """Whether the topic no longer reaches back to its beginning."""
        return any(bounds.first > 0 for bounds in self.bounds.get(topic, {}).values())


@dataclass(frozen=True, slots=True)
class Line:
    """A version trained, as history.jsonl has it."""

    version: int
    published: int
    trained: tuple[str, ...]
    """Ids."""
    batch: int
    staleness: tuple[int, int]
    """Least and greatest of its tokens, versions."""
    counts: Mapping[str, int]
    """The ledger's sums after it: offered, trained, dropped, dead_lettered, pending."""


@dataclass(frozen=True, slots=True)
class AuditedCheckpoint:
    """One that the store took and that holds."""

    name: str
    version: Version
    writer: int
    digest: str
    """Of weights that were announced."""
    trained_versions: int
    ledger: LedgerState
    offsets: Mapping[int, int]
    task_offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Stored:
    """A version in the store."""

    version: Version
    digest: str
    writer: int
    bytes: int
    object: str = ""
    trouble: str = ""
    """What is wrong with its object, if that was looked at."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A run."""

    run: str
    samples: int
    """In a group, where the log does not say."""
    max_staleness: int
    every: int
    """Versions from one checkpoint to the next."""
    log: LogContents = LogContents()
    checkpoint: AuditedCheckpoint | None = None
    """In force: the newest that holds."""
    lines: tuple[Line, ...] = ()
    """That the checkpoint counts."""
    tail: tuple[Line, ...] = ()
    """Beyond: trained, and not yet counted. Without a checkpoint, all."""
    damaged: tuple[str, ...] = ()
    """What is wrong with newer checkpoints than that in force, a sentence each."""
    stored: tuple[Stored, ...] = ()
    leases: Mapping[str, int] = field(default_factory=dict)
    epoch: int = 0
    """Of the newest writer; 0 when none was issued."""
    commits: tuple[tuple[int, int], ...] = ()
    """Version and writer of each checkpoint that counts."""
    faults: tuple[Finding, ...] = ()
    """What could not be read at all."""
    notes: tuple[str, ...] = ()
