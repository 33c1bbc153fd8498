"""Scoring of batches with one set of weights, shared by the surrogates that need a forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.lora import copy_trained
from palimpsest.services.learner.model.policy import score_batch


@torch.no_grad()
def score(model: torch.nn.Module, batches: Sequence[PaddedBatch], device: torch.device) -> list[Tensor]:
    """Return the log-probs of each micro-batch, [rows, tokens] float32, nats, for all versions; 0 where untrainable."""
    return [score_batch(model, batch, device) for batch in batches]


class Shadow:
    """A copy of the model that computes with other weights. The first use creates it, in the dtype of the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._learns = [parameter.requires_grad for parameter in model.parameters()]
        self._copy: torch.nn.Module | None = None

    @torch.no_grad()
    def with_weights(self, weights: Sequence[Tensor]) -> torch.nn.Module:
        """Return the copy with its trainable parameters cast from `weights`. Raises ValueError if shapes differ."""
        if self._copy is None:
            self._copy = copy_trained(self._model).requires_grad_(False)
        own = [parameter for parameter, learns in zip(self._copy.parameters(), self._learns, strict=True) if learns]
        if [weight.shape for weight in weights] != [parameter.shape for parameter in own]:
            raise ValueError(f"{len(weights)} weights do not match {len(own)} parameters in number or shape")
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
        return self._copy
