"""Scoring by all ranks: rank 0 hands micro-batches out, and each rank scores its share by the weights that it holds.

A micro-batch is scored whole by one rank, so its layout, and with it every bit of the values, is as on a single rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from palimpsest.common.arrays import Float32Array
from palimpsest.services.learner.batch.batching import Padded
from palimpsest.services.learner.distributed import NOTHING, Ranks
from palimpsest.services.learner.model.policy import token_logprobs

Pass = Callable[[Padded], Float32Array]
"""Log-prob of every token under the resident weights, [rows, tokens] float32, nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """What rank 0 hands out: micro-batches, of which each rank takes every `size`-th, beginning at its own number."""

    batches: tuple[Padded, ...]


class Together:
    """Rank 0's side. All ranks must hold the same weights, and the others be in `score_along`."""

    def __init__(self, ranks: Ranks, one: Pass) -> None:
        self._ranks, self._one = ranks, one

    @property
    def width(self) -> int:
        """So many micro-batches take as long as one."""
        return self._ranks.size

    def __call__(self, batches: Sequence[Padded]) -> list[Float32Array]:
        """Each micro-batch's log-probs, [rows, tokens] float32, nats."""
        if self._ranks.size > 1:
            self._ranks.share((Scoring(tuple(batches)),))
        shares = _share(self._ranks, batches, self._one)
        return [shares[place % len(shares)][place // len(shares)] for place in range(len(batches))]


def score_along(ranks: Ranks, one: Pass) -> object:
    """Ranks other than 0: score what rank 0 hands out until it says something else, and return that (None: nothing)."""
    while isinstance(word := ranks.share(NOTHING)[0], Scoring):
        _share(ranks, word.batches, one)
    return word


def resident(model: torch.nn.Module, device: torch.device) -> Pass:
    """Scores by this model, whatever its weights are at the time."""

    @torch.no_grad()
    def score(batch: Padded) -> Float32Array:
        values, _ = token_logprobs(
            model, torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.temperatures).to(device)
        )
        scored: Float32Array = values.cpu().numpy()
        return scored

    return score


def _share(ranks: Ranks, batches: Sequence[Padded], one: Pass) -> list[list[Float32Array]]:
    """Every rank's share of the values, in rank order."""
    return ranks.gather([one(batch) for batch in batches[ranks.rank :: ranks.size]])
