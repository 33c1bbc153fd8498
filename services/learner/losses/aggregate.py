"""From the tokens' losses to one number (docs/algorithms/aggregation.md). Pure.

Denominators are those of the whole minibatch over all ranks, fixed before the first backward pass and blind to what
was removed. So each micro-batch gives a share, and the shares (and their gradients) add up, however rows are split.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from palimpsest.services.learner.losses.types import masked_fill_zero

Mode = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "dr_grpo"]


@dataclass(frozen=True, slots=True)
class Denominators:
    """Of the whole minibatch, over all ranks."""

    tokens: int
    """Trainable tokens, removed ones included."""
    sequences: int
    """Trajectories with any trainable token."""
    length: int
    """Longest trajectory there can be (sampling.max_trajectory_tokens)."""

    @classmethod
    def of(cls, trainable: Iterable[int], length: int) -> "Denominators":
        """trainable: for each trajectory of the minibatch, how many of its tokens are."""
        counts = list(trainable)
        return cls(tokens=sum(counts), sequences=sum(count > 0 for count in counts), length=length)


def aggregate(losses: Tensor, mask: Tensor, mode: Mode, denominators: Denominators) -> Tensor:
    """This micro-batch's share of the loss, a scalar; the shares of all of them, on all ranks, add up to it.

    losses: [rows, tokens], 0 where removed; mask: bool, trainable tokens, removed ones included; whole trajectories in
    the rows. Raises ValueError for a mode that is none.
    """
    counted = masked_fill_zero(losses, mask)
    tokens, sequences = max(1, denominators.tokens), max(1, denominators.sequences)
    match mode:
        case "token_mean":
            return counted.sum() / tokens
        case "seq_mean_token_sum":
            return counted.sum() / sequences
        case "seq_mean_token_mean":
            return (counted.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / sequences
        case "dr_grpo":
            return counted.sum() / (sequences * denominators.length)
    raise ValueError(f"{mode!r} is no way to aggregate: take one of {', '.join(get_args(Mode))}")
