"""The ranks of a simulated learner: one process group in simulated time. Each rank is an Actor (simulated_time.py)."""

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from palimpsest.services.learner.distributed import ProcessGroup
from tests.simulation.simulated_time import Actor

FOREVER_S = 1e7
own_rank: ContextVar[int] = ContextVar("own_rank", default=0)
"""Rank of the learner that the present code belongs to."""


@dataclass
class _Round:
    """One collective operation."""

    values: dict[int, Any] = field(default_factory=dict)
    waiting: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Meeting:
    """Where the ranks of one learner exchange values. `delay`: called before a rank other than 0 takes part."""

    size: int
    delay: Callable[[], None]
    calls: "Counter[int]" = field(default_factory=Counter)
    rounds: dict[int, _Round] = field(default_factory=dict)
    error: BaseException | None = None
    """Of a rank that failed: the others fail with it, as torchrun ends them."""

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, when all have come."""
        if rank:
            self.delay()
        number, self.calls[rank] = self.calls[rank], self.calls[rank] + 1
        own = self.rounds.setdefault(number, _Round())
        own.values[rank] = value
        if len(own.values) == self.size:
            self._wake(own)
        while len(own.values) < self.size and self.error is None:
            Actor.here.actor.sleep(FOREVER_S, own.waiting.append)
        if self.error is not None:
            raise self.error
        return [own.values[each] for each in range(self.size)]

    def fail(self, error: BaseException) -> None:
        """A rank failed."""
        self.error = error
        for each in self.rounds.values():
            self._wake(each)

    def _wake(self, one: _Round) -> None:
        loop = Actor.here.actor.loop
        for callback in one.waiting:
            loop.call_soon(callback)
        one.waiting.clear()


class SimulatedRank(ProcessGroup):
    """See ProcessGroup."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self._meeting = meeting
        self.size = self.shares = meeting.size
        self.rank = self.share = rank

    def broadcast_object(self, value: Any) -> Any:
        """See ProcessGroup."""
        sent = pickle.dumps(value) if self.is_rank0 else b""
        received = self._meeting.exchange(self.rank, sent)[0]
        return value if self.is_rank0 else pickle.loads(received)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """See ProcessGroup."""
        sent = [tensor.detach().clone() for tensor in tensors] if self.is_rank0 else []
        for own, tensor in zip(tensors, self._meeting.exchange(self.rank, sent)[0], strict=True):
            own.detach().copy_(tensor)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """See ProcessGroup."""
        parts = self._meeting.exchange(self.rank, [tensor.clone() for tensor in tensors])
        for own, *others in zip(tensors, *parts, strict=True):
            own.copy_(sum(others[1:], others[0]))

    def all_gather_object(self, value: Any) -> list[Any]:
        """See ProcessGroup."""
        return self._meeting.exchange(self.rank, value)
