"""Scoring of batches with one set of weights, shared by the surrogates that need a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.lora import copy_trained
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.sharding.sharded_model import local_values


@dataclass(frozen=True, slots=True)
class SplitPolicy:
    """A policy whose model is split over the ranks: each rank averages its part of the masters."""

    copy: Callable[[], torch.nn.Module]
    """Builds a sharded copy of the model in its own dtype. All ranks call it."""
    gather: Callable[[list[float]], list[list[float]]] | None
    """Returns the numbers of every rank, in rank order. None if each rank has all masters: those of an adapter."""


@torch.no_grad()
def score(model: torch.nn.Module, batches: Sequence[PaddedBatch], device: torch.device) -> list[Tensor]:
    """Return the log-probs of each micro-batch, [rows, tokens] float32, nats, for all versions; 0 where untrainable."""
    return [score_batch(model, batch, device) for batch in batches]


class Shadow:
    """A copy of the model that computes with other weights. The first use creates it, in the dtype of the model."""

    def __init__(self, model: torch.nn.Module, split: SplitPolicy | None = None) -> None:
        self._model, self._split = model, split
        self._learns = [parameter.requires_grad for parameter in model.parameters()]
        self._copy: torch.nn.Module | None = None

    @torch.no_grad()
    def with_weights(self, weights: Sequence[Tensor]) -> torch.nn.Module:
        """Return the copy with its trainable parameters cast from `weights`, or this rank's shards of them. Raises
        ValueError if shapes differ."""
        if self._copy is None:
            split = self._split
            self._copy = copy_trained(self._model).requires_grad_(False) if split is None else split.copy()
        both = zip(self._copy.parameters(), self._learns, strict=True)
        own = [local_values(parameter) for parameter, learns in both if learns]
        if [weight.shape for weight in weights] != [parameter.shape for parameter in own]:
            raise ValueError(f"{len(weights)} weights do not match {len(own)} parameters in number or shape")
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
        return self._copy
