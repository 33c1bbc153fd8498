"""The critic, split over the ranks like the policy: float32 masters and moments of this rank's shards.

Only its scalar head is whole on every rank: it computes in float32, while FSDP2 casts all weights that it gathers
together to one type. The head's gradients are summed over the ranks before the optimizer step.

If the policy trains an adapter, the critic has an adapter and shards of the frozen weights of its own. All that it
trains is whole on every rank then.
"""

from functools import partial

import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.model.critic import STEPS, Critic, critic_optimizer
from palimpsest.services.learner.model.lora import copy_adapter
from palimpsest.services.learner.model.output_head import decoder_of
from palimpsest.services.learner.model.packing import PackedRows
from palimpsest.services.learner.model.policy import checkpoint_activations
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.sharded_model import ShardedModel
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards


class ShardedCritic(Critic):
    """See Critic. All ranks must make equally many passes, and step together."""

    _valued: ShardedModel

    def __init__(self, model: ShardedModel, trainable: ShardedPolicy | AdapterPolicy) -> None:
        """model: see ModelFiles.build_valued."""
        self._use(model, trainable)

    def forward(self, tokens: Tensor, rows: PackedRows | None) -> Tensor:
        """See Critic. A pass that fails on a row is completed on all ranks, see ShardedModel.score."""
        return self._valued.score(
            lambda valued: _values(valued, tokens, rows),
            failed=lambda: torch.zeros(tokens.shape, device=tokens.device),
        )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over the number of steps; shards are read with those of the policy. Raises ValueError if the checkpoint
        is of a run without a critic."""
        if not isinstance(self.trainable, ShardedPolicy):
            super().restore(tensors)
            return
        self._refuse_other(tensors)
        self.trainable.steps = int(tensors[STEPS][0])


def build_critic(shards: Shards, config: LearnerConfig) -> ShardedCritic:
    """Return the critic of a sharded policy. All ranks must call it."""
    model, policy = shards.files.build_valued(), shards.split_policy
    copy_adapter(decoder_of(model.causal), decoder_of(shards.policy.model.causal))
    if config.activation_checkpointing:
        model(partial(_compute_again, every=config.activation_checkpointing_every))
    if policy is None:
        return ShardedCritic(model, AdapterPolicy(model, critic_optimizer(config)))
    policy.beside["critic"] = ShardedPolicy(model, critic_optimizer(config), shards.ranks)
    return ShardedCritic(model, policy.beside["critic"])


def _values(valued: torch.nn.Module, tokens: Tensor, rows: PackedRows | None) -> Tensor:
    values: Tensor = valued(tokens, rows)
    return values


def _compute_again(valued: torch.nn.Module, *, every: int) -> None:
    """Let every n-th layer compute its activations again in the backward pass."""
    checkpoint_activations(decoder_of(valued), every=every)
