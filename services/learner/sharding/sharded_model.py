"""A causal language model whose weights are split over the ranks with FSDP2 of torch.

Each rank holds a shard of every weight, along its first dimension. A block gathers its weights just before it computes
and frees them after it. Weights outside the blocks (embedding, last norm, output head) are gathered for the whole pass.
So each pass needs all ranks, and all ranks must make equally many passes in the same order.

The weights that compute are the shards cast to `computes`: bf16 for float32 masters. These bytes are published.

Parameters that are added after the split are whole on every rank, and FSDP2 does not know them: the critic's head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.failing_rows import may_be_of_row
from palimpsest.services.learner.model.output_head import decoder_of
from palimpsest.services.learner.sharding.pass_errors import BlockGuard, PassErrors, complete_backward

T = TypeVar("T")


class ShardedModel(torch.nn.Module):
    """The root of a sharded model. Call it with a function of the causal model: inside, all weights can be read."""

    def __init__(self, causal: torch.nn.Module) -> None:
        super().__init__()
        self.causal = causal
        self.computes_on = torch.device("cpu")
        """Device of the passes. The shards may be in the host's memory."""
        self.errors = PassErrors()
        self.guard = BlockGuard()

    def forward(self, function: Callable[[torch.nn.Module], T]) -> T:
        """Return `function(causal)`. All ranks must call it."""
        try:
            result = function(self.causal)
            if self.guard.active:
                self.guard.check()
            return result
        except Exception as error:
            if not self.guard.active or not may_be_of_row(error):
                raise
            if self.guard.entered == 0:  # before the first block: let the blocks take part in a pass over padding
                if self.guard.context is not None:
                    self.guard.error = error  # without their exchanges
                padding = torch.zeros((1, 2), dtype=torch.int64, device=self.computes_on)
                decoder_of(self.causal)(input_ids=padding, use_cache=False)
            if self.guard.entered != self.guard.blocks:
                raise
            self.guard.error = self.guard.error or error
            self.guard.tell(error)
        nothing: Any = None
        return nothing  # type: ignore[no-any-return]

    def score(self, function: Callable[[torch.nn.Module], T], failed: Callable[[], T]) -> T:
        """Return `function(causal)`, which makes one forward pass. All ranks must call it.

        If it fails on a row, all ranks still complete the pass, and also the backward pass that follows one with
        gradient. Then this rank raises the error, and those that share the row raise OtherRankFailed. A pass without
        gradient returns `failed()` inside of `errors.deferred`.
        """
        gradient, root = torch.is_grad_enabled(), self._root()
        # The weights outside the blocks stay whole for the backward pass, which needs them first and frees them.
        root.set_reshard_after_forward(not gradient, recurse=False)
        try:
            with self.guard.guarding():
                result: T = self(function)
            if (error := self.guard.error) is None:
                return result
            if gradient:
                complete_backward(self, error)
                raise error
            self.errors.add(error)
            return failed()
        finally:
            self.guard.error = None
            root.set_reshard_after_forward(True, recurse=False)

    def _root(self) -> Any:
        return self

    def shards(self) -> Iterator[tuple[str, DTensor]]:
        """Yield the causal model's own name and the parameter of each weight that is split. A tied weight comes
        once."""
        for name, parameter in self.causal.named_parameters():
            if isinstance(parameter, DTensor):
                yield name, parameter


def blocks_of(causal: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks that are gathered one by one: those that transformers never splits over devices.

    Raises UserError if the model names none.
    """
    names = set(getattr(causal, "_no_split_modules", None) or ())
    blocks = [module for module in causal.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f'learner.sharding: transformers names no blocks of {type(causal).__name__}; set learner.sharding = "none"'
        )
    return blocks


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's passes."""
    return model.computes_on if isinstance(model, ShardedModel) else next(model.parameters()).device


def shard(
    causal: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    mesh: DeviceMesh,
    *,
    computes: torch.dtype,
    offload: bool = False,
) -> ShardedModel:
    """Split the model over the mesh: over its only dimension, or over the second of (replicas, shards).

    causal: a causal model, or its decoder with another head. blocks: of it, see `blocks_of`. computes: type of the
    weights in a pass. Gradients are summed over the ranks in float32, not averaged. Other tensors keep their types.
    offload: the shards, their gradients and moments stay in the host's memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    sharded = ShardedModel(causal)
    for block in blocks:
        sharded.guard.wrap(block)
    # The root frees its weights after a pass without gradient, too: they would survive an optimizer step after it.
    for module in (*blocks, sharded):
        whole: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, offload_policy=place)
        whole.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        whole.set_gradient_divide_factor(1.0)
    root: Any = sharded
    # A rank whose rows reach no token of a weight still takes part in the sum of its gradient.
    root.set_reduce_scatter_unused_params(True)
    assert isinstance(sharded, FSDPModule)
    return sharded


def whole(parameter: DTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return all of a weight, on every rank, cast to a type before it is gathered. All ranks must call it.

    It is gathered on the device of the mesh, also if the shards are in the host's memory: by NCCL on GPUs.
    """
    own = local_values(parameter).to(parameter.device_mesh.device_type, dtype or parameter.dtype)
    return like(parameter, own).full_tensor()


def like(parameter: DTensor, local: Tensor) -> DTensor:
    """Return a distributed tensor with this rank's shard `local`, split like the parameter.

    The shard stays where it is. `DTensor.from_local` would copy one in the host's memory to a GPU of the mesh.
    """
    meta = TensorMeta(parameter.shape, parameter.stride(), local.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, meta)
    made: DTensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def local_values(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter: its shard, or all of it. A write changes it."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def detached(parameter: Tensor) -> DTensor:
    """Return the parameter without its gradient. A write changes it."""
    values = parameter.detach()
    assert isinstance(values, DTensor)
    return values
