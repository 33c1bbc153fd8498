"""Aggregation of token losses to one scalar (docs/algorithms/aggregation.md). Pure.

The denominators count the minibatch over all ranks. They are fixed before the first backward pass and include removed
tokens. Each micro-batch therefore contributes a share, and the shares and their gradients add up for any split of the
rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from palimpsest.services.learner.losses.types import masked_fill_zero

Mode = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "dr_grpo"]


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts of one minibatch over all ranks."""

    tokens: int
    """Trainable tokens, removed ones included."""
    sequences: int
    """Trajectories with at least one trainable token."""
    length: int
    """Maximum trajectory length (sampling.max_trajectory_tokens)."""

    @classmethod
    def of(cls, trainable: Iterable[int], length: int) -> "Denominators":
        """Return the denominators of a minibatch. trainable: number of trainable tokens of each trajectory."""
        counts = list(trainable)
        return cls(tokens=sum(counts), sequences=sum(count > 0 for count in counts), length=length)


def aggregate(losses: Tensor, mask: Tensor, mode: Mode, denominators: Denominators) -> Tensor:
    """Return this micro-batch's share of the loss, a scalar. The shares of all micro-batches on all ranks add up.

    losses: [rows, tokens], 0 where removed; mask: bool, trainable tokens, including removed ones. Each row holds one
    complete trajectory. Raises ValueError for an unknown mode.
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
    raise ValueError(f"unknown aggregation mode {mode!r}; use one of {', '.join(get_args(Mode))}")
