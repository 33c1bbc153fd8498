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
from palimpsest.services.learner.sharding.sharded_model import ShardedModel, detached

NORM_EPSILON = 1e-6
"""Term added to the norm by which gradients are divided, as in torch.nn.utils.clip_grad_norm_."""


class ShardedPolicy(TrainablePolicy):
    """See TrainablePolicy. Masters, moments and gradients are this rank's shards, as plain tensors.

    All ranks must call `step` together.
    """

    model: ShardedModel

    def __init__(self, model: ShardedModel, config: OptimizerConfig, ranks: ProcessGroup) -> None:
        self.model, self._config, self._ranks = model, config, ranks
        self.parameters = [parameter for _, parameter in model.shards() if parameter.requires_grad]
        self.masters = [detached(parameter).to_local() for parameter in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            parameter.grad = like(parameter, master.grad)  # FSDP2 adds to it in place
        self.optimizer = adamw(self.masters, config)
        self.steps = 0
        self.source: Path | None = None
        """Folder of the shards that `share` reads, on rank 0."""
        self.companions: dict[str, Sequence[Tensor]] = {}
        """Name -> further tensors split like the masters, which checkpoints hold, too. They are read in place."""

    def sum_gradients(self, ranks: ProcessGroup) -> None:
        """Do nothing: the backward passes have summed them."""

    def discard_gradients(self) -> None:
        """See TrainablePolicy."""
        for gradient in self.gradients():
            gradient.zero_()

    def _clip(self) -> float:
        """Scale the gradients down to the maximum norm; return the norm before.

        Each rank adds up the squares of its shards in float64, and all ranks add the sums in rank order, so the norm
        has the same bits on every rank and in every run with as many ranks.
        """
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in self.gradients()]
        own = float(torch.stack(norms).square().sum())
        norm = math.sqrt(math.fsum(self._ranks.all_gather_object(own)) / self._copies)
        scale = min(1.0, self._config.max_grad_norm / (norm + NORM_EPSILON))
        if scale < 1.0:
            torch._foreach_mul_(self.gradients(), scale)
        return norm

    @property
    def _copies(self) -> int:
        """Number of ranks that hold each shard."""
        return self._ranks.size // self.parameters[0].device_mesh.size(-1)

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
        source, steps = ranks.broadcast_object((self.source, self.steps))
        if source is not None:
            tensors = self.shards()
            load(tensors, checkpoint_id=source)
            self._take(tensors, steps)
        self.source = None

    def shards(self) -> dict[str, Tensor]:
        """Return masters, moments and companions as distributed tensors, by name."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            moments: dict[str, Any] = self.optimizer.state.get(master, {})
            tensors[f"{i}.master"] = like(parameter, master)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{key}"] = like(parameter, moments.get(key, torch.zeros_like(master)))
            for name, companion in self.companions.items():
                tensors[f"{i}.{name}"] = like(parameter, companion[i])
        return tensors

    def _take(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take over moments that a checkpoint was read into. The masters are read in place."""
        for i, master in enumerate(self.masters):
            if steps:
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": _local(tensors[f"{i}.exp_avg"]),
                    "exp_avg_sq": _local(tensors[f"{i}.exp_avg_sq"]),
                }
        self.steps = steps

    def _publish(self) -> None:
        """Do nothing: the masters are cast when they are gathered."""


def like(parameter: DTensor, local: Tensor) -> DTensor:
    """Return a distributed tensor with this rank's shard `local`, split like the parameter."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
