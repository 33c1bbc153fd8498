"""Passes that fail on a row while other ranks are in the same pass.

A pass of a sharded model is a sequence of gathers and sums of all ranks. If the computation of one rank fails, this
rank still takes part in the rest of the sequence, with values that are not used. Its error comes afterwards, when all
ranks are at the same place again and can agree to repeat the pass without the row.

Forward: the failing block returns its input, the later blocks do so at once. An error before the first block is
followed by a pass over padding. Backward: FSDP2's own steps for each block are called without gradients; torch has no
public function for that, so they are internals of the torch version in pyproject.toml.

If ranks share rows (context_parallel), they also exchange tensors inside of the blocks. There all ranks of the group
leave the pass at the same place: before each exchange they check whether one of them has failed, and again at the end
of each block, of the forward pass and of the backward pass. So the rank with the error tells the others in the block in
which it failed, or in the next one, after FSDP2 has gathered the weights: between two blocks the others wait for those.

Only errors that a row can have caused are held back; all others end this rank at once.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from palimpsest.services.learner.distributed import Context
from palimpsest.services.learner.model.failing_rows import may_be_of_row


class PassErrors:
    """Errors of passes without gradient, of a policy and of the other models built from the same files."""

    def __init__(self) -> None:
        self._deferred: list[Exception] | None = None

    def add(self, error: Exception) -> None:
        """Raise the error of a complete pass, or keep it inside of `deferred`."""
        if self._deferred is None:
            raise error
        self._deferred.append(error)

    @property
    def any_deferred(self) -> bool:
        """Whether a pass has failed inside of this `deferred`: its values mean nothing."""
        return bool(self._deferred)

    @contextmanager
    def deferred(self) -> Iterator[list[Exception]]:
        """Let failing passes return zeros in this block. The yielded list gets their errors."""
        errors = self._deferred = list[Exception]()
        try:
            yield errors
        finally:
            self._deferred = None


class BlockGuard:
    """Lets the blocks of one model take part in a pass that has failed."""

    def __init__(self) -> None:
        self.active = False
        """Whether the current pass is guarded."""
        self.error: Exception | None = None
        """Error of the current pass."""
        self.entered = 0
        """Number of blocks that the current forward pass has called."""
        self.blocks = 0
        self.context: Context | None = None
        """The ranks that share rows with this one."""

    def check(self) -> None:
        """Hear of errors of the ranks that share rows with this one. Raises OtherRankFailed."""
        if self.context is not None:
            self.context.check()

    def tell(self, error: Exception) -> None:
        """Tell the ranks that share rows with this one that the pass has failed."""
        if self.context is not None:
            self.context.tell(error)

    def wrap(self, block: torch.nn.Module) -> None:
        """Guard the forward passes of a block. Its calls keep their hooks, which gather and free its weights."""
        self.blocks += 1
        forward, returns_tuple = block.forward, False

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal returns_tuple
            if not self.active or _in_backward():  # an error in a repeated forward pass is one of the backward pass
                return forward(*args, **kwargs)
            self.entered += 1
            if self.error is None:
                try:
                    output = forward(*args, **kwargs)
                    self.check()
                except Exception as error:
                    if not may_be_of_row(error):
                        raise
                    self.error = error
                else:
                    returns_tuple = isinstance(output, tuple)
                    return output
            self.tell(self.error)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if returns_tuple else hidden

        block.forward = guarded
        # FSDP2 puts its own hook before this one, so the backward pass checks before it sums the block's gradients.
        block.register_forward_pre_hook(self._watch, with_kwargs=True)

    def _watch(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let the backward pass check when it leaves the block: the gradient of the block's input is complete then."""
        if self.context is None or not self.active or _in_backward():
            return None
        if args:
            return (_watched(args[0], self.context), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _watched(kwargs["hidden_states"], self.context)}

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Guard the passes of this block."""
        self.active, self.error, self.entered = True, None, 0
        if self.context is not None:
            self.context.error = ""
        try:
            yield
        finally:
            self.active = False


def _watched(hidden: Tensor, context: Context) -> Tensor:
    if not hidden.requires_grad:
        return hidden
    result: Tensor = _EndOfBlock.apply(hidden, context)  # type: ignore[no-untyped-call]
    return result


class _EndOfBlock(torch.autograd.Function):
    """The identity; its backward pass checks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, context: Context) -> Tensor:
        ctx.context = context
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.context.check()
        return gradient, None


@contextmanager
def completing(model: torch.nn.Module, *, ends: bool = True) -> Iterator[None]:
    """Complete the backward pass of a sharded model if this block fails on a row, then raise the error.

    The block holds everything from the end of the forward pass to the end of the backward pass; or a first part of
    that, if not `ends`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(model, FSDPModule) and may_be_of_row(error):
            complete_backward(model, error)
        raise
    if ends and isinstance(model, FSDPModule):
        sharded: Any = model
        sharded.guard.check()


@torch.no_grad()
def complete_backward(model: Any, error: Exception) -> None:
    """Take part in what is left of a backward pass, without gradients. The forward pass must be complete. error: what
    ended it on this rank.

    Blocks that have summed their gradients are left out, and the first blocks if nothing in them is trained, which a
    backward pass does not reach. Afterwards the gradients of all ranks are undefined.
    """
    state = model._get_fsdp_state()
    own = set(map(id, state._fsdp_param_groups))
    # earlier passes without gradient are in the list, too
    groups = list({id(group): group for group in reversed(state._comm_ctx.post_forward_order)}.values())
    while groups and not _trained(groups[-1]):
        groups.pop()
    for group in groups:
        if group._training_state == TrainingState.POST_BACKWARD:
            continue
        group.pre_backward(True)
        if id(group) not in own:
            model.guard.tell(error)
            group.post_backward()
    state._root_post_backward_final_callback()
    model.guard.tell(error)


def _trained(group: Any) -> bool:
    return any(parameter.requires_grad for module in group.modules for parameter in module.parameters())


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
