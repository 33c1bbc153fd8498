"""The value model of `gae`: what return the current policy can expect from each token on.

It is the starting model once more, with a head of one number in place of the vocabulary, and learns by itself: its own
masters, moments and gradients. Its values are computed anew for every batch: values kept since sampling would be those
of an older critic, one more staleness.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.services.learner.model.trainable import TrainablePolicy

STEPS = "steps"


class Critic:
    """The value model and its optimizer. Every rank holds one and sums the gradients."""

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig) -> None:
        """model: the causal LM at version 0, which is copied; config: as the policy's, with the critic's own lr."""
        self._valued = _Valued(model)
        self.trainable = TrainablePolicy(self._valued, config)
        """Masters and optimizer; `broadcast_state` and checkpoints treat it as they treat the policy's."""

    @torch.no_grad()
    def values(self, tokens: Tensor) -> Tensor:
        """Return expected from each token on, before that token is known. [rows, length] float32; 0 at index 0

        tokens: [rows, length] int64, padded on the right.
        """
        values: Tensor = self._valued(tokens)
        return values

    def loss(
        self,
        tokens: Tensor,
        mask: Tensor,
        returns: Tensor,
        old_values: Tensor,
        *,
        clip: float | None,
        denominator: float,
    ) -> Tensor:
        """This micro-batch's share of the value loss, with gradient. Shapes: see `value_loss`."""
        return value_loss(self._valued(tokens), returns, old_values, mask, clip=clip, denominator=denominator)

    def gradients(self) -> list[Tensor]:
        """Accumulated float32 gradients, to be summed over ranks."""
        return self.trainable.gradients()

    def step(self) -> float:
        """Clip, step, forget the gradients; the norm before clipping. One that is not finite changes nothing."""
        return self.trainable.step()

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and the number of steps by name, for a checkpoint."""
        return self.trainable.state() | {STEPS: torch.tensor([self.trainable.steps])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises ValueError when it is another model's."""
        if STEPS not in tensors:
            raise ValueError(f"no number of steps stands in it ({STEPS}): it is no critic's state")
        own = {name: tensor for name, tensor in tensors.items() if name != STEPS}
        self.trainable.restore(own, int(tensors[STEPS][0]))


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor, mask: Tensor, *, clip: float | None, denominator: float
) -> Tensor:
    """sum over the mask of 1/2 max((V - G)^2, (V' - G)^2) / denominator, V' = V kept within clip of the old value.

    values (with gradient), returns, old_values: [rows, tokens] float32, units of reward; mask: bool, trainable tokens;
    old_values: before the version's training; clip None: 1/2 (V - G)^2 alone; denominator: trainable tokens of the
    minibatch over all ranks, so that the shares of micro-batches and ranks add up.
    """
    zero = torch.zeros((), device=mask.device)
    squares = torch.where(mask, values - returns, zero) ** 2
    if clip is not None:
        moved = torch.where(mask, values - old_values, zero).clamp(-clip, clip)
        kept = torch.where(mask, old_values + moved - returns, zero) ** 2
        squares = torch.maximum(squares, kept)
    return 0.5 * squares.sum() / denominator


class _Valued(torch.nn.Module):
    """A decoder with a scalar head."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        causal: Any = model
        # without the vocabulary's head: it would cost memory, and logits that nobody reads
        self.decoder = copy.deepcopy(causal.base_model)
        self.head = torch.nn.Linear(causal.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        # from 0: the first advantages hold no noise of a critic that knows nothing, and every rank starts alike
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(next(model.parameters()).device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Values, index t speaking of token t: what stands before it decides. The shift happens here only."""
        hidden = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        values = self.head(hidden[:, :-1].float())[..., 0]
        return torch.nn.functional.pad(values, (1, 0))
