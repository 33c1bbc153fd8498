"""The processes of the learner: a single one, or several under torchrun.

Every rank holds a full copy of the model, or a shard of it, and a share of each batch; gradients are summed. Only rank
0 uses the log.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from palimpsest.common.user_error import UserError

T = TypeVar("T")
NOTHING: tuple[object] = (None,)
"""The object that rank 0 broadcasts when it has no order, and at the end of the run."""
TIME_LIMIT = datetime.timedelta(days=1)
"""Time limit of a collective operation. It is long because other ranks wait in one while rank 0 waits for data;
torchrun ends all ranks when one dies."""


class OtherRankFailed(RuntimeError):
    """A pass failed on another of the ranks that share its rows. The text is its type and text there."""


@dataclass(slots=True, eq=False)
class Context:
    """The ranks that share each row, and what they know of errors in the present pass."""

    rank: int
    """Of this process in the group."""
    size: int
    group: Any
    """The process group of torch.distributed."""
    error: str = ""
    """Of the present pass; "" while no rank has reported one. Equal on all ranks."""

    def check(self) -> None:
        """Hear of errors of the other ranks. All ranks call it at the same places of a pass, before each exchange of
        tensors, until one of them has failed and calls `tell`. Raises OtherRankFailed then, and for the rest of the
        pass."""
        self.error = self.error or self._first_error("")
        if self.error:
            raise OtherRankFailed(self.error)

    def tell(self, error: Exception) -> None:
        """Tell the other ranks, once, that the pass has failed here. They must come to a `check`."""
        self.error = self.error or self._first_error(f"{type(error).__name__}: {error}")

    def _first_error(self, own: str) -> str:
        """The error of the first rank that has one. A few bytes between the processors, whatever the device is."""
        failed = torch.tensor([bool(own)], dtype=torch.uint8)
        of_ranks = torch.empty(self.size, dtype=torch.uint8)
        dist.all_gather(list(of_ranks.chunk(self.size)), failed, group=self.group)
        if not of_ranks.any():
            return ""
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, own, group=self.group)
        return next(text for text in texts if text)

    def gather(self, own: Tensor) -> Tensor:
        """Return the tensors of all ranks, one after another along the first dimension. They have one shape."""
        sent = own.detach().contiguous()
        result = sent.new_empty(self.size * len(sent), *sent.shape[1:])
        dist.all_gather(list(_bytes(result).chunk(self.size)), _bytes(sent), group=self.group)
        return result

    def sum_of_shares(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks of the own part of `values`, which has a part for each rank along the first
        dimension. Added in float32 in the order of the ranks, so that a repetition has the same bits."""
        sent = values.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(_bytes(received), _bytes(sent), group=self.group)
        first, *others = received.view(self.size, -1, *values.shape[1:]).unbind()
        total = first.float()
        for part in others:
            total = total + part.float()
        result: Tensor = total.to(values.dtype)
        return result


class ProcessGroup:
    """The ranks of the learner, and the rank and device of this process."""

    def __init__(self, *, equal_passes: bool = False) -> None:
        """equal_passes: whether all ranks must make equally many passes, because each pass needs all of them."""
        self.equal_passes = equal_passes
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        on_gpu = torch.cuda.is_available()
        self.device = _own_gpu() if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if self.size > 1:
            dist.init_process_group(backend, timeout=TIME_LIMIT)
        elif equal_passes:  # a single rank shards over itself
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self.together = 1
        self.shares, self.share = self.size, self.rank
        """Number of shares of the rows, and the one of this rank. Ranks that share rows have the same."""
        self.context: Context | None = None

    def share_rows(self, together: int) -> None:
        """Let consecutive ranks share each row (learner.context_parallel). All ranks must call it with the same number.

        Raises UserError if it does not divide the number of ranks.
        """
        if self.size % together:
            raise UserError(
                f"learner.context_parallel is {together}, but the learner has {self.size} ranks, which it does not "
                f"divide: change it, or local.learner_ranks"
            )
        self.together = together
        self.shares, self.share = self.size // together, self.rank // together
        self.context = _context(self.size, self.rank, together) if together > 1 else None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        if self.size > 1:
            box: list[T | None] = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        assert value is not None
        return value

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.size > 1:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            start = 0
            for tensor in tensors:
                tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        boxes: list[T | None] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return [box for box in boxes if box is not None]

    def gather_shares(self, value: T) -> list[T]:
        """The value of each share of the rows, on every rank: of several ranks with one share, that of the first."""
        return self.all_gather_object(value)[:: self.together]

    def passes_of_all(self, own: int) -> int:
        """Return the number of passes that this rank has to make: its own, or the largest of any rank if all ranks must
        make equally many. Then all ranks must call it."""
        return max(self.all_gather_object(own)) if self.equal_passes else own

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _own_gpu() -> torch.device:
    """The GPU of this rank: that with the rank's number on this machine. Raises UserError if there are fewer."""
    number, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= visible:
        raise UserError(
            f"rank {number} of this machine has no GPU: the learner sees {visible} (CUDA_VISIBLE_DEVICES). Start as "
            f"many ranks as GPUs (local.learner_ranks, torchrun --nproc-per-node), or let it see more"
        )
    return torch.device("cuda", number)


def _context(size: int, rank: int, together: int) -> Context:
    """The group of this rank. Every rank creates all groups, as torch requires."""
    groups = [
        dist.new_group(list(range(first, first + together)), timeout=TIME_LIMIT) for first in range(0, size, together)
    ]
    return Context(rank % together, together, groups[rank // together])


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as numbers of 8 bits: gloo does not move every type."""
    return tensor.view(torch.uint8)
