"""A causal language model whose weights are split over the ranks with FSDP2 of torch.

Each rank holds a shard of every weight, along its first dimension. A block gathers its weights just before it computes
and frees them after it. Weights outside the blocks (embedding, last norm, output head) are gathered for the whole pass.
So each pass needs all ranks, and all ranks must make equally many passes in the same order.

The weights that compute are the shards cast to `computes`: bf16 for float32 masters. These bytes are published.
"""

from collections.abc import Callable, Iterator
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

from palimpsest.common.user_error import UserError

T = TypeVar("T")


class ShardedModel(torch.nn.Module):
    """The root of a sharded model. Call it with a function of the causal model: inside, all weights can be read."""

    def __init__(self, causal: torch.nn.Module) -> None:
        super().__init__()
        self.causal = causal
        self.computes_on = torch.device("cpu")
        """Device of the passes. The shards may be in the host's memory."""

    def forward(self, function: Callable[[torch.nn.Module], T]) -> T:
        """Return `function(causal)`. All ranks must call it."""
        return function(self.causal)

    def keep_whole(self, *, until_backward: bool) -> None:
        """Whether the next calls leave the weights outside the blocks whole for their backward pass, which then need
        not be gathered again. The backward pass frees them."""
        root: Any = self
        root.set_reshard_after_forward(until_backward is False, recurse=False)

    def shards(self) -> Iterator[tuple[str, DTensor]]:
        """Yield the causal model's own name and the parameter of each weight. A tied weight comes once."""
        for name, parameter in self.causal.named_parameters():
            assert isinstance(parameter, DTensor)
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


def shard(causal: torch.nn.Module, mesh: DeviceMesh, *, computes: torch.dtype, offload: bool = False) -> ShardedModel:
    """Split the model over the mesh: over its only dimension, or over the second of (replicas, shards).

    computes: type of the weights in a pass. Gradients are summed over the ranks in float32, not averaged. Other tensors
    keep their types. offload: the shards, their gradients and moments stay in the host's memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    sharded = ShardedModel(causal)
    # The root frees its weights after a pass without gradient, too: they would survive an optimizer step after it.
    for module in (*blocks_of(causal), sharded):
        whole: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, offload_policy=place)
        whole.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        whole.set_gradient_divide_factor(1.0)
    root: Any = sharded
    # A rank whose rows reach no token of a weight still takes part in the sum of its gradient.
    root.set_reduce_scatter_unused_params(True)
    assert isinstance(sharded, FSDPModule)
    return sharded


def whole(parameter: DTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return all of a weight, on every rank, cast to a type before it is gathered. All ranks must call it."""
    own = detached(parameter)
    return (own if dtype is None else detached(own.to(dtype))).full_tensor()


def detached(parameter: Tensor) -> DTensor:
    """Return the parameter without its gradient. A write changes it."""
    values = parameter.detach()
    assert isinstance(values, DTensor)
    return values
