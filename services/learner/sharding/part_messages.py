"""Orders about the parts of a version, from a thread of rank 0 to a thread of each other rank.

The loops of the ranks make passes meanwhile, whose collective operations must come in one order on all ranks. So these
threads use none. They exchange messages through a key-value store of torch that rank 0 serves:

    order N             what to do with the part
    result N of RANK    what came of it, or the error
"""

import os
from functools import partial
from threading import Event, Thread
from typing import Any, Literal

import msgspec
import torch.distributed as dist
from msgspec import Struct

from palimpsest.common.file_errors import user_error_for
from palimpsest.common.snapshots.encoding import EncodedVersion
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.distributed import TIME_LIMIT, ProcessGroup
from palimpsest.services.learner.sharding.version_part import VersionPart

POLL_S = 0.02
"""Pause between looks for a message, seconds."""


class PartOrder(Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank does with its part; see the methods of VersionPart."""

    do: Literal["encode", "send", "keep"]
    flag: bool = False
    """`delta` of encode, `again` of send."""


class PartResult(Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank did."""

    encoded: EncodedVersion | None = None
    refused: int = 0
    """Bytes for which the store has no room."""
    error: str = ""
    """Why it failed."""
    code: ExitCode = ExitCode.CRASHED


class PartFailed(Exception):
    """Raised if another rank failed to store its part."""


class MessagesClosed(Exception):
    """Raised in a thread that waits for a message if the process ends."""


class PartMessages:
    """The messages between the ranks, of a thread of each."""

    def __init__(self, store: Any, *, rank: int, size: int) -> None:
        """store: a store of torch.distributed, the same for all ranks."""
        self._store, self.rank, self.size = store, rank, size
        self._closed = Event()

    def post(self, key: str, message: PartOrder | PartResult) -> None:
        """Leave a message."""
        self._store.set(key, msgspec.json.encode(message).decode())

    def order(self, number: int) -> PartOrder:
        """Return an order when it is there. Raises MessagesClosed."""
        return msgspec.json.decode(self._read(f"order {number}"), type=PartOrder)

    def result(self, number: int, rank: int) -> PartResult:
        """Return the result of a rank when it is there, and remove it. Raises MessagesClosed."""
        body = self._read(key := f"result {number} of {rank}")
        self._store.delete_key(key)
        return msgspec.json.decode(body, type=PartResult)

    def forget(self, number: int) -> None:
        """Remove an order that all ranks have done."""
        self._store.delete_key(f"order {number}")

    def close(self) -> None:
        """End the wait for a message."""
        self._closed.set()

    def _read(self, key: str) -> bytes:
        while not self._store.check([key]):
            if self._closed.wait(POLL_S):
                raise MessagesClosed
        body: bytes = self._store.get(key)
        return body


def open_messages(ranks: ProcessGroup) -> PartMessages:
    """Return the messages of this rank. All ranks must call it."""
    if ranks.size == 1:
        return PartMessages(dist.HashStore(), rank=0, size=1)  # type: ignore[attr-defined]
    connect: Any = dist.TCPStore  # type: ignore[attr-defined]
    connect = partial(connect, os.environ["MASTER_ADDR"], timeout=TIME_LIMIT, wait_for_workers=False)
    own = connect(0, is_master=True) if ranks.is_rank0 else None
    port = ranks.broadcast_object(None if own is None else own.port)
    return PartMessages(own or connect(port, is_master=False), rank=ranks.rank, size=ranks.size)


class MessageOrders:
    """See PartOrders. By messages: each other rank must have a PartServer at work."""

    def __init__(self, messages: PartMessages, part: VersionPart) -> None:
        self._messages, self._part = messages, part
        self._number = 0

    def encode(self, *, delta: bool) -> list[EncodedVersion]:
        """See PartOrders. Raises UserError, PartFailed."""
        results = self._results(PartOrder("encode", delta))
        return [result.encoded for result in results if result.encoded is not None]

    def send(self, *, again: bool = False) -> int:
        """See PartOrders. Raises UserError, PartFailed."""
        return sum(result.refused for result in self._results(PartOrder("send", again)))

    def keep(self) -> None:
        """See PartOrders."""
        self._results(PartOrder("keep"))

    def _results(self, order: PartOrder) -> list[PartResult]:
        number, self._number = self._number, self._number + 1
        self._messages.post(f"order {number}", order)
        results = [done(self._part, order)]
        for rank in range(1, self._messages.size):
            results.append(result := self._messages.result(number, rank))
            if result.error:
                text = f"rank {rank} of the learner could not store its part of a version: {result.error}"
                raise PartFailed(text) if result.code is ExitCode.CRASHED else UserError(text, result.code)
        self._messages.forget(number)
        return results


class PartServer:
    """Ranks other than 0: does what rank 0 orders, in a thread for each version."""

    def __init__(self, messages: PartMessages, part: VersionPart) -> None:
        self._messages, self._part = messages, part
        self._number = 0
        self._thread: Thread | None = None

    def begin(self) -> None:
        """Serve the orders for the next version. `finish` must have returned."""
        assert self._thread is None
        self._thread = Thread(target=self._serve, name="version part", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the version is stored."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def close(self) -> None:
        """End the thread: the process ends."""
        self._messages.close()
        self.finish()

    def _serve(self) -> None:
        stored = False
        while not stored:
            try:
                order = self._messages.order(self._number)
            except MessagesClosed:
                return
            try:
                result = done(self._part, order)
            except Exception as error:  # rank 0 raises it, and the learner ends
                result = failed(error)
            self._messages.post(f"result {self._number} of {self._messages.rank}", result)
            self._number += 1
            stored = order.do == "keep"


def done(part: VersionPart, order: PartOrder) -> PartResult:
    """Do what the order says, and return what came of it."""
    match order.do:
        case "encode":
            return PartResult(encoded=part.encode(delta=order.flag))
        case "send":
            return PartResult(refused=part.send(again=order.flag))
        case "keep":
            part.keep()
            return PartResult()


def failed(error: Exception) -> PartResult:
    """Return the result of a failure, with the text and the exit code that the rank would have ended with."""
    if isinstance(error, OSError):
        error = user_error_for(error) or error
    if isinstance(error, UserError):
        return PartResult(error=str(error), code=error.code)
    return PartResult(error=f"{type(error).__name__}: {error}")
