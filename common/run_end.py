"""Whether a run that finished is over: for workers and replicas that start after its end. Pure.

A learner that continues a run has an epoch above that of the learner that finished it, and begins only if the run has
versions left to train. So a run is over if it trained as many versions as it is to have, and no newer learner began.
"""

from palimpsest.common.config.settings import VERSIONS
from palimpsest.common.messages import Control, ControlChanged, RunFinished


class RunEnd:
    """Follows the records of topic `control`, in their order.

    >>> from palimpsest.common.versions import Version
    >>> end = RunEnd(versions=30)
    >>> end.observe(RunFinished("r", Version(30), 1, 30))
    >>> end.announced.versions
    30
    >>> RunEnd(versions=60).announced is None
    True
    """

    def __init__(self, versions: int) -> None:
        """versions: learner.versions of the run file of this process."""
        self._versions = versions
        self._change = (0, 0)
        self._finished: RunFinished | None = None

    def observe(self, message: Control) -> None:
        """Note a record of the learner that had the run when it wrote."""
        if self._finished is not None and message.writer > self._finished.writer:
            self._finished = None  # a newer learner began
        if isinstance(message, RunFinished):
            self._finished = message
        if isinstance(message, ControlChanged) and message.what == "settings" and message.follows(*self._change):
            self._change = (message.number, message.writer)
            if isinstance(versions := message.after.get(VERSIONS), int):
                self._versions = versions

    @property
    def announced(self) -> RunFinished | None:
        """The end of the run, unless the run has versions left or a newer learner wrote a record. None: no such end.

        A newer learner may have begun and written nothing yet: ask the store.
        """
        return self._finished if self._finished is not None and self._finished.versions >= self._versions else None
