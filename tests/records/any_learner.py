"""An authority for tests without a store: every epoch and every version is known."""

from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.versions import Version


class AnyLearner:
    """See Authority in common/snapshots/control_check.py."""

    def newest_writer(self) -> int:
        return 1 << 30

    def newest_version(self) -> Version:
        return Version(1 << 30)


def any_control() -> ControlCheck:
    """A check that still rejects records of replaced learners and records without an epoch."""
    return ControlCheck(AnyLearner())
