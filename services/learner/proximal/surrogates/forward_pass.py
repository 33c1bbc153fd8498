"""Log-probs of whole batches by one set of weights: what a surrogate that needs a forward pass is made of."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.policy import score_batch


@torch.no_grad()
def score(model: torch.nn.Module, batches: Sequence[PaddedBatch], device: torch.device) -> list[Tensor]:
    """Of each micro-batch [rows, tokens] float32, nats, whichever version sampled a token; 0 where untrainable."""
    scored = []
    for batch in batches:
        values, _ = score_batch(model, batch, device)
        scored.append(torch.where(torch.from_numpy(batch.mask).to(device), values, torch.zeros((), device=device)))
    return scored


class Shadow:
    """A copy of the model that computes with other weights. Made at the first use: one copy in the model's dtype."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._learns = [parameter.requires_grad for parameter in model.parameters()]
        self._copy: torch.nn.Module | None = None

    @torch.no_grad()
    def with_weights(self, weights: Sequence[Tensor]) -> torch.nn.Module:
        """The copy, its learning parameters cast from these, in their order. Raises ValueError when they do not fit."""
        if self._copy is None:
            self._copy = copy.deepcopy(self._model).requires_grad_(False)
        own = [parameter for parameter, learns in zip(self._copy.parameters(), self._learns, strict=True) if learns]
        if [weight.shape for weight in weights] != [parameter.shape for parameter in own]:
            raise ValueError(f"{len(weights)} weights were given for {len(own)} parameters: not of one model, or shape")
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
        return self._copy
