"""Orders from a thread of rank 0 to threads of the other ranks. No process group exists here: nothing is collective."""

import errno
import threading
from typing import Any

import pytest
import torch.distributed as dist

from palimpsest.common.snapshots.encoding import EncodedVersion
from palimpsest.common.snapshots.manifest import TensorEntry
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.sharding.part_messages import MessageOrders, PartFailed, PartMessages, PartServer


class Part:
    """Replaces a VersionPart."""

    def __init__(self, rank: int, failure: Exception | None = None) -> None:
        self.rank, self.failure = rank, failure
        self.notes: list[str] = []

    def encode(self, *, delta: bool) -> EncodedVersion:
        self._note(f"encode {delta}")
        entry = TensorEntry(f"w{self.rank}", "bfloat16", (2, 3), "d", 0, 9)
        return EncodedVersion([entry], digest=f"part {self.rank}", size=9, kinds={"same": 1})

    def send(self, *, again: bool = False) -> int:
        self._note(f"send {again}")
        if self.failure is not None:
            raise self.failure
        return 0 if again else 10 * self.rank

    def keep(self) -> None:
        self._note("keep")

    def _note(self, what: str) -> None:
        assert not dist.is_initialized()
        self.notes.append(what)


def ranks(*parts: Part) -> tuple[MessageOrders, list[PartServer], Any]:
    """Rank 0's orders, the servers of the other ranks, and the store between them."""
    between: Any = dist.HashStore()  # type: ignore[attr-defined]
    messages = [PartMessages(between, rank=rank, size=len(parts)) for rank in range(len(parts))]
    servers = [PartServer(each, part) for each, part in zip(messages[1:], parts[1:], strict=True)]  # type: ignore[arg-type]
    return MessageOrders(messages[0], parts[0]), servers, between  # type: ignore[arg-type]


def test_every_rank_does_what_rank_0_orders_and_the_results_are_in_rank_order() -> None:
    parts = [Part(rank) for rank in range(3)]
    orders, servers, between = ranks(*parts)
    for _ in range(2):
        for server in servers:
            server.finish()
            server.begin()
        encoded = orders.encode(delta=True)
        assert [(each.digest, each.entries[0].name, each.kinds) for each in encoded] == [
            (f"part {rank}", f"w{rank}", {"same": 1}) for rank in range(3)
        ]
        assert orders.send() == 30
        assert orders.send(again=True) == 0
        orders.keep()
    for server in servers:
        server.finish()
    assert [part.notes for part in parts] == [["encode True", "send False", "send True", "keep"] * 2] * 3
    assert between.num_keys() == 0, "read messages are removed"


def test_without_another_rank_no_message_is_needed() -> None:
    (part,) = parts = [Part(0)]
    orders, _, between = ranks(*parts)
    assert len(orders.encode(delta=False)) == 1
    orders.keep()
    assert part.notes == ["encode False", "keep"]
    assert between.num_keys() == 0


@pytest.mark.parametrize(
    ("failure", "kind", "code", "text"),
    [
        (UserError("no token", ExitCode.DAMAGED), UserError, ExitCode.DAMAGED, "no token"),
        (OSError(errno.ENOSPC, "full", "/tmp/x"), UserError, ExitCode.UNAVAILABLE, "writing /tmp/x"),
        (RuntimeError("broken"), PartFailed, None, "RuntimeError: broken"),
    ],
)
def test_an_error_of_another_rank_ends_the_publishing_of_rank_0(
    failure: Exception, kind: type[Exception], code: ExitCode | None, text: str
) -> None:
    orders, servers, _ = ranks(Part(0), Part(1), Part(2, failure))
    for server in servers:
        server.begin()
    orders.encode(delta=False)
    with pytest.raises(kind, match="rank 2 of the learner could not store its part of a version: ") as caught:
        orders.send()
    assert text in str(caught.value)
    assert getattr(caught.value, "code", None) == code
    for server in servers:
        server.close()


def test_the_end_of_a_process_ends_the_wait_for_an_order() -> None:
    _, (server,), _ = ranks(Part(0), Part(1))
    before = set(threading.enumerate())
    server.begin()
    begun = {thread for thread in set(threading.enumerate()) - before if thread.name == "version part"}
    assert len(begun) == 1
    server.close()
    assert not begun & set(threading.enumerate())
