"""Searches for failing rows in passes that need all ranks: the ranks search one after another.

While one rank tries some of its rows, the others pass padding. So an error, and a gradient that is not finite anywhere,
belong to the rows that are tried.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.failing_rows import may_be_of_row

T = TypeVar("T")


class NotFinite(ArithmeticError):
    """A gradient is infinite or not a number."""

    def __init__(self) -> None:
        super().__init__("the gradient is not finite")


class Turns:
    """The order in which ranks search. Without `equal_passes` each rank searches alone, at the same time."""

    def __init__(
        self, ranks: ProcessGroup, idle: Callable[[], object], is_finite: Callable[[], bool] = lambda: True
    ) -> None:
        """idle: a pass over padding; is_finite: whether this rank's part of the gradient is, after a pass."""
        self._ranks, self._idle, self._is_finite = ranks, idle, is_finite

    def search(self, own: Callable[[], T]) -> T:
        """Return `own()`, whose passes must be in `trial`. With `equal_passes` all ranks must call it. Ranks that share
        rows search together: a pass fails on all of them."""
        if not self._ranks.equal_passes:
            return own()
        for share in range(self._ranks.share):
            self._assist(share)
        result = own()
        self._ranks.gather_shares(False)
        for share in range(self._ranks.share + 1, self._ranks.shares):
            self._assist(share)
        return result

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Do one pass of this rank's search in this block. Raises NotFinite if the gradient is not finite on any
        rank."""
        if self._ranks.equal_passes:
            self._ranks.all_gather_object(True)
        try:
            yield
        except Exception as error:
            if may_be_of_row(error):
                self._all_finite()
            raise
        if not self._all_finite():
            raise NotFinite

    def _assist(self, share: int) -> None:
        """Take part in the passes in which the ranks of another share search."""
        while self._ranks.gather_shares(False)[share]:
            self._idle()
            self._all_finite()

    def _all_finite(self) -> bool:
        own = self._is_finite()
        return all(self._ranks.all_gather_object(own)) if self._ranks.equal_passes else own
