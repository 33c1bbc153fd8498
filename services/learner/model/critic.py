"""The value model (critic) of `gae`. It predicts the expected return of the current policy before each token.

The critic is a copy of the starting model with a scalar head in place of the vocabulary head. It has separate masters,
moments and gradients. If the policy trains an adapter, the critic has an adapter of its own on the same frozen weights.
The learner computes values for every batch at training time: values stored at sampling time would come from an older
critic and add a second staleness.
"""

from typing import Any

import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.services.learner.model.context import SlicedRows, context_of
from palimpsest.services.learner.model.lora import copy_trained
from palimpsest.services.learner.model.packing import PackedRows, packs_rows
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.pass_errors import completing

STEPS = "steps"


def critic_optimizer(config: LearnerConfig) -> OptimizerConfig:
    """Return the optimizer settings of the critic: those of the policy, with the critic's learning rate."""
    return config.optimizer.model_copy(update={"lr": config.advantages.critic.lr})


class Critic:
    """The value model and its optimizer. Every rank holds a copy; gradients are summed over ranks."""

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig) -> None:
        """model: the causal LM at version 0; it is copied. config: learner.optimizer with the critic's lr."""
        causal: Any = model
        # Copy only the decoder: the critic does not use the vocabulary head or its logits.
        valued = Valued(copy_trained(model, causal.base_model), packs=packs_rows(model))
        valued.add_head(causal.config.get_text_config().hidden_size, next(model.parameters()).device)
        self._use(valued, TrainablePolicy(valued, config))

    def _use(self, valued: torch.nn.Module, trainable: TrainablePolicy) -> None:
        self._valued = valued
        self.trainable = trainable
        """Masters and optimizer. `broadcast_state` and checkpoints handle them like the policy's."""

    @property
    def model(self) -> torch.nn.Module:
        """The model that computes the values."""
        return self._valued

    def forward(self, tokens: Tensor, rows: PackedRows | None) -> Tensor:
        """Return the values, with gradient if the caller's mode records it; see `values`."""
        values: Tensor = self._valued(tokens, rows)
        return values

    @torch.no_grad()
    def values(self, tokens: Tensor, rows: PackedRows | None = None) -> Tensor:
        """Return the expected return before each token. [rows, length] float32, 0 at index 0.

        tokens: [rows, length] int64, padded on the right. rows: needed if the passes of the policy are packed.
        """
        return self.forward(tokens, rows)

    @torch.no_grad()
    def final_values(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Value of the state after the last token of each row. [rows] float32

        tokens: [rows, length] int64, padded on the right; lengths: [rows], tokens of each row without padding.
        """
        longer = torch.nn.functional.pad(tokens, (0, 1))  # the state after the last token needs one more position
        rows = PackedRows.of(lengths.tolist(), longer.shape[1], tokens.device)
        return self.forward(longer, rows).gather(1, lengths[:, None])[:, 0]

    def loss(
        self,
        tokens: Tensor,
        mask: Tensor,
        returns: Tensor,
        old_values: Tensor,
        *,
        clip: float | None,
        denominator: float,
        rows: PackedRows | None = None,
    ) -> Tensor:
        """Return this micro-batch's share of the value loss, with gradient.

        Shapes: see `value_loss`; rows: see `values`.
        """
        values = self.forward(tokens, rows)
        with completing(self._valued, ends=False):
            return value_loss(values, returns, old_values, mask, clip=clip, denominator=denominator)

    def gradients(self) -> list[Tensor]:
        """Accumulated float32 gradients, to be summed over ranks."""
        return self.trainable.gradients()

    def step(self) -> float:
        """Clip the gradients, take an optimizer step, reset the gradients. Return the norm before clipping.

        A norm that is not finite skips the step.
        """
        return self.trainable.step()

    def state(self) -> dict[str, Tensor]:
        """Return masters, moments and the number of steps by name, for a checkpoint."""
        return self.trainable.state() | {STEPS: torch.tensor([self.trainable.steps])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore a checkpoint. Raises ValueError if it belongs to another model."""
        self._refuse_other(tensors)
        own = {name: tensor for name, tensor in tensors.items() if name != STEPS}
        self.trainable.restore(own, int(tensors[STEPS][0]))

    def _refuse_other(self, tensors: dict[str, Tensor]) -> None:
        if STEPS not in tensors:
            raise ValueError(f"checkpoint has no {STEPS!r} tensor: it is not a critic's state")


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor, mask: Tensor, *, clip: float | None, denominator: float
) -> Tensor:
    """Return the sum over the mask of 1/2 max((V - G)^2, (V' - G)^2) / denominator, V' = V clipped around the old one.

    values (with gradient), returns, old_values: [rows, tokens] float32, in units of reward. mask: bool, trainable
    tokens. old_values: values before this version's training. clip: V' is within clip of the old value; None uses
    1/2 (V - G)^2. denominator: trainable tokens of the minibatch over all ranks, so that the shares of micro-batches
    and ranks add up.
    """
    zero = torch.zeros((), device=mask.device)
    squares = torch.where(mask, values - returns, zero) ** 2
    if clip is not None:
        moved = torch.where(mask, values - old_values, zero).clamp(-clip, clip)
        kept = torch.where(mask, old_values + moved - returns, zero) ** 2
        squares = torch.maximum(squares, kept)
    return 0.5 * squares.sum() / denominator


class Valued(torch.nn.Module):
    """A decoder with a scalar head."""

    head: torch.nn.Linear

    def __init__(self, decoder: torch.nn.Module, *, packs: bool) -> None:
        """decoder: of a causal LM, for the critic alone. packs: whether its passes are packed. Call `add_head` next."""
        super().__init__()
        self.decoder, self._packs = decoder, packs

    def add_head(self, hidden_size: int, device: torch.device) -> None:
        """Add a head in float32. It is zero: it adds no noise to the first advantages and is equal on all ranks."""
        self.head = torch.nn.Linear(hidden_size, 1, dtype=torch.float32)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(device)

    @property
    def base_model(self) -> torch.nn.Module:
        """The decoder, under the name that causal LMs give theirs."""
        return self.decoder

    def forward(self, tokens: Tensor, rows: PackedRows | None) -> Tensor:
        """Return values [rows, length]. Index t depends on the tokens before t. The shift happens only here."""
        if not self._packs:
            hidden = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
            return torch.nn.functional.pad(self.head(hidden[:, :-1].float())[..., 0], (1, 0))
        assert rows is not None
        arguments, context, sliced = rows.arguments(tokens), context_of(self), None
        if context is not None:
            sliced = SlicedRows.of(rows.starts.diff().tolist(), tokens.shape[1], context, tokens.device)
            arguments = sliced.arguments(tokens)
        values = self.head(self.decoder(**arguments, use_cache=False).last_hidden_state[0].float())[:, 0]
        if sliced is not None:
            values = sliced.whole(values)
        spread = rows.spread(values, tokens.numel()).view(tokens.shape)
        return torch.nn.functional.pad(spread[:, :-1], (1, 0))
