"""Trains on despite rows on which a pass fails: they are taken out of their micro-batch and reported.

Each rank decides about its own rows and keeps the shape of its micro-batches, so the ranks stay in step in their
collective operations. The results of all ranks are merged, so all know which rows failed.

If each pass needs all ranks (sharding), a rank cannot repeat its own passes: the guard is then inactive, and an error
ends the learner.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from palimpsest.common.logs import logger
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.failing_rows import failing_rows, may_be_of_row, neutral
from palimpsest.services.learner.model.policy import score_batch

T = TypeVar("T")
Score = Callable[[torch.nn.Module, PaddedBatch, torch.device], T]


class RowGuard:
    """Calls steps of the training again without the rows on which they fail."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, active: bool = True) -> None:
        self._model, self._device, self.active = model, device, active
        self._rejected: dict[str, str] = {}

    def call(self, step: Callable[[], T], batches: list[PaddedBatch], places: Iterable[int] | None = None) -> T:
        """Return `step()`. If it fails on rows of `batches[places]` (default: all), replace them by zeros, then repeat
        it once.

        The step must not have changed any state when it fails on a row, and must read `batches` again. Raises its error
        if that belongs to no row, or if the guard is inactive.
        """
        if not self.active:
            return step()
        try:
            return step()
        except Exception as error:
            if not may_be_of_row(error) or not self._take_out(batches, places):
                raise
        return step()

    def forward(self, score: Score[T], batches: list[PaddedBatch], place: int) -> T:
        """Return `score` of `batches[place]` with the policy, without the rows on which it fails."""
        return self.call(lambda: score(self._model, batches[place], self._device), batches, [place])

    def take(self) -> dict[str, str]:
        """Return the trajectories that failed since the last call, with their error texts."""
        rejected, self._rejected = self._rejected, {}
        return rejected

    def _take_out(self, batches: list[PaddedBatch], places: Iterable[int] | None) -> bool:
        """Replace the failing rows. Return whether there are any."""
        any_found = False
        for place in range(len(batches)) if places is None else places:
            batch = batches[place]
            found = failing_rows(lambda part: score_batch(self._model, part, self._device), batch)
            if not found:
                continue
            any_found = True
            self.take_out(batches, place, found)
        return any_found

    def take_out(self, batches: list[PaddedBatch], place: int, found: Mapping[int, str]) -> None:
        """Replace rows of `batches[place]` by zeros and remember them. found: index of the row -> error text."""
        batch = batches[place]
        batches[place] = neutral(batch, found)
        for row, reason in found.items():
            self._rejected[batch.rows[row].trajectory] = reason
            logger().warning("trajectory not trained on", trajectory=batch.rows[row].trajectory, reason=reason)
