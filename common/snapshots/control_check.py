"""Checks that records of `control`, and offers, come from the learner that has the run, by what the store knows.

Each learner takes an epoch from the store and names it in its records. Epochs grow, and a new learner announces a
version first, so a record with a lower epoch than an earlier record is late: its learner was replaced. The store never
issued the epoch, or does not hold the version, of a record that another program made up.
"""

from typing import Protocol

from palimpsest.common.messages import Control, CutReleased, GroupOffered
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.versions import Version


class Authority(Protocol):
    """What the store knows about learners and versions. SnapshotClient is one."""

    def newest_writer(self) -> int:
        """Return the newest epoch; 0 before the first one."""

    def newest_version(self) -> Version:
        """Return the newest version in the store; -1 before the first one."""


class ControlCheck:
    """Checks the records of one topic `control`, in their order. Asks the store only about what it has not seen."""

    def __init__(self, store: Authority) -> None:
        self._store = store
        self._epoch = 0
        """Epoch of the newest learner whose record was accepted."""
        self._issued = 0
        self._newest = Version(-1)

    def asks_store(self, message: Control | GroupOffered) -> bool:
        """Whether `check` has to ask the store about the message, which may block."""
        return message.writer > self._issued or self.is_unknown(_version(message))

    def check(self, message: Control, *, history: bool = False) -> bool:
        """Whether the message is of the learner that has the run. False: it is late, of a learner that was replaced.

        Raises RejectedRecord for a message that no learner of the run wrote.

        history: the record is older than its reader. Only then may it name no epoch: earlier releases wrote none.
        """
        if 0 <= message.writer < self._epoch and (message.writer or history):
            return False
        self._check_writer(message.writer, history=history)
        self.check_version(_version(message))
        self._epoch = message.writer
        return True

    def is_newest(self, writer: int) -> bool:
        """Whether no learner began after the one of this epoch. Asks the store, which may block."""
        return self._store.newest_writer() <= writer

    def check_offer(self, offer: GroupOffered, *, history: bool) -> None:
        """Raise RejectedRecord for an offer that no learner of the run wrote, or of a version that was never stored.

        The offers of a replaced learner count: its successor continues them. history: see `check`.
        """
        self._check_writer(offer.writer, history=history)
        self.check_version(offer.version)

    def _check_writer(self, writer: int, *, history: bool) -> None:
        if writer == 0 and not history:
            raise RejectedRecord(RejectCause.UNKNOWN_WRITER, "the record names no learner (field writer)")
        if writer > self._issued:
            self._issued = self._store.newest_writer()
        if not 0 <= writer <= self._issued:
            raise RejectedRecord(
                RejectCause.UNKNOWN_WRITER,
                f"the record is of learner {writer}, but the newest learner of the store is {self._issued}",
            )

    def check_version(self, version: Version) -> None:
        """Raise RejectedRecord for a version that the run cannot have published, since the store never held it."""
        if self.is_unknown(version):
            self._newest = self._store.newest_version()
        if self.is_unknown(version):
            raise RejectedRecord(
                RejectCause.UNKNOWN_VERSION,
                f"the record names version {version}, but the newest version of the store is {self._newest}",
            )

    def is_unknown(self, version: Version) -> bool:
        """Whether the store has not been seen to hold this version or a later one."""
        return version > self._newest


def _version(message: Control | GroupOffered) -> Version:
    return Version(-1) if isinstance(message, CutReleased) else message.version
