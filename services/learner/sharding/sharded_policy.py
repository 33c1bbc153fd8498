"""The policy in training, split over the ranks: float32 masters and moments of this rank's shards.

The bf16 weights that compute are the masters cast while they are gathered; there is no other copy. FSDP2 adds the sum
of all ranks' gradients of a pass to this rank's gradient as soon as the backward pass has reached a block. So the ranks
are summed within a micro-batch, then the micro-batches in their order. A replicated policy sums micro-batches first:
with one micro-batch the gradients are equal bit for bit, with more they differ by the order of the sum.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy, adamw
from palimpsest.services.learner.sharding.sharded_model import ShardedModel, like, local_values

NORM_EPSILON = 1e-6
"""Term added to the norm by which gradients are divided, as in torch.nn.utils.clip_grad_norm_."""


class ShardedPolicy(TrainablePolicy):
    """See TrainablePolicy. Masters, moments and gradients are this rank's shards, as plain tensors.

    A parameter that is not split, such as the critic's head, is its own float32 master on every rank. All ranks must
    call `step` together.
    """

    model: ShardedModel

    def __init__(self, model: ShardedModel, config: OptimizerConfig, ranks: ProcessGroup) -> None:
        self.model, self._config, self._ranks = model, config, ranks
        self.parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        """DTensors, and parameters that are not split."""
        self.masters = [local_values(parameter) for parameter in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            parameter.grad = _like(parameter, master.grad)  # FSDP2 and autograd add to it in place
        self.optimizer = adamw(self.masters, config)
        self.steps = 0
        self.source: Path | None = None
        """Folder of the shards that `share` reads, on rank 0."""
        self.companions: dict[str, Sequence[Tensor]] = {}
        """Name -> further tensors split like the masters, which checkpoints hold, too. They are read in place."""
        self.beside: dict[str, ShardedPolicy] = {}
        """Name -> further trained weights, which checkpoints hold, too: the critic's."""

    def sum_gradients(self, ranks: ProcessGroup) -> None:
        """Sum the gradients of parameters that are not split: the backward passes have summed the others."""
        if own := self._gradients(split=False):
            ranks.all_reduce_sum(own)

    def squared_norm(self) -> float:
        """Return the square of the norm of the whole gradient. All ranks must call it.

        Each rank adds up the squares of its shards in float64, and all ranks add the sums in rank order, so the result
        has the same bits on every rank and in every run with as many ranks.
        """
        own, whole = (_squares(self._gradients(split=split)) for split in (True, False))
        return math.fsum(self._ranks.all_gather_object(own)) / self._copies + whole

    def discard_gradients(self) -> None:
        """See TrainablePolicy."""
        for gradient in self.gradients():
            gradient.zero_()

    def _clip(self) -> float:
        """Scale the gradients down to the maximum norm; return the norm before."""
        norm = math.sqrt(self.squared_norm())
        scale = min(1.0, self._config.max_grad_norm / (norm + NORM_EPSILON))
        if scale < 1.0:
            torch._foreach_mul_(self.gradients(), scale)
        return norm

    def _gradients(self, *, split: bool) -> list[Tensor]:
        """The gradients of parameters that are split, or of the others."""
        both = zip(self.parameters, self.gradients(), strict=True)
        return [gradient for parameter, gradient in both if isinstance(parameter, DTensor) == split]

    @property
    def _copies(self) -> int:
        """Number of ranks that hold each shard."""
        first = next(parameter for parameter in self.parameters if isinstance(parameter, DTensor))
        return self._ranks.size // first.device_mesh.size(-1)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: all ranks write their shards to the checkpoint (shard_files.py)."""
        return {}

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take over the number of steps. `share` then reads the shards of `source`. Raises UserError if the checkpoint
        has whole tensors instead."""
        if tensors or self.source is None:
            raise UserError(
                "the newest checkpoint of this run was written without sharding: continue the run with "
                'learner.sharding = "none"'
            )
        self.steps = steps

    def share(self, ranks: ProcessGroup) -> None:
        """Read the shards of rank 0's `source`, if it has one, on all ranks."""
        own = {name: policy.steps for name, policy in self.beside.items()}
        source, steps, beside = ranks.broadcast_object((self.source, self.steps, own))
        if source is not None:
            tensors = self.shards()
            load(tensors, checkpoint_id=source)
            self._take(tensors, steps)
            for name, policy in self.beside.items():
                policy._take(_of(tensors, name), beside[name])
        self.source = None

    def shards(self) -> dict[str, Tensor]:
        """Return masters, moments, companions and what is trained beside them, by name: distributed tensors, and whole
        ones that are equal on all ranks."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            moments: dict[str, Any] = self.optimizer.state.get(master, {})
            tensors[f"{i}.master"] = _like(parameter, master)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{key}"] = _like(parameter, moments.get(key, torch.zeros_like(master)))
            for name, companion in self.companions.items():
                tensors[f"{i}.{name}"] = _like(parameter, companion[i])
        for name, policy in self.beside.items():
            tensors |= {f"{name}.{own}": tensor for own, tensor in policy.shards().items()}
        return tensors

    def _take(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take over moments that a checkpoint was read into. The masters are read in place."""
        for i, master in enumerate(self.masters):
            if steps:
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": local_values(tensors[f"{i}.exp_avg"]),
                    "exp_avg_sq": local_values(tensors[f"{i}.exp_avg_sq"]),
                }
        self.steps = steps

    def _publish(self) -> None:
        """Do nothing: the masters are cast when they are gathered."""


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """`like`, or `local` itself if the parameter is not split."""
    return like(parameter, local) if isinstance(parameter, DTensor) else local


def _squares(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all numbers, added in float64."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def _of(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part, by its own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
