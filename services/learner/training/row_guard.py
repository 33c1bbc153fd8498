"""Trains on despite rows on which a pass fails: they are taken out of their micro-batch and reported.

Each rank decides about its own rows and keeps the shape of its micro-batches, so the ranks stay in step in their
collective operations. The results of all ranks are merged, so all know which rows failed.

If each pass needs all ranks (sharding), a step completes although passes of it fail. Then the ranks search for the rows
one after another, and all ranks repeat the step.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from palimpsest.common.logs import logger
from palimpsest.services.learner.batch.batching import PaddedBatch, empty_batch
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.failing_rows import failing_rows, may_be_of_row, neutral
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.sharding.pass_errors import PassErrors
from palimpsest.services.learner.sharding.sharded_model import ShardedModel
from palimpsest.services.learner.sharding.turns import Turns

T = TypeVar("T")
Score = Callable[[torch.nn.Module, PaddedBatch, torch.device], T]


class RowGuard:
    """Calls steps of the training again without the rows on which they fail."""

    def __init__(self, model: torch.nn.Module, device: torch.device, ranks: ProcessGroup) -> None:
        self._model, self._device, self._ranks = model, device, ranks
        self._rejected: dict[str, str] = {}
        self._turns = Turns(ranks, self._idle)

    def call(
        self,
        step: Callable[[], T],
        batches: list[PaddedBatch],
        places: Iterable[int] | None = None,
        *,
        undo: Callable[[], None] = lambda: None,
    ) -> T:
        """Return `step()`. If it fails on rows of `batches[places]` (default: all), replace them by zeros, then repeat
        it once.

        The step must read `batches` again, and may have changed no other state than what `undo` takes back. Raises its
        error if that belongs to no row. If a pass needs all ranks, its passes are without gradient and all ranks must
        call it.
        """
        if isinstance(self._model, ShardedModel):
            return self._together(self._model.errors, step, batches, places, undo)
        try:
            return step()
        except Exception as error:
            if not may_be_of_row(error) or not self._take_out(batches, places):
                raise
        undo()
        return step()

    def _together(
        self,
        errors: PassErrors,
        step: Callable[[], T],
        batches: list[PaddedBatch],
        places: Iterable[int] | None,
        undo: Callable[[], None],
    ) -> T:
        """`call` on all ranks."""
        with errors.deferred() as failed:
            result = step()
        if not any(self._ranks.all_gather_object(bool(failed))):
            return result
        found = self._turns.search(lambda: bool(failed) and self._take_out(batches, places))
        if failed and not found:
            raise failed[0]
        undo()
        return step()

    def forward(self, score: Score[T], batches: list[PaddedBatch], place: int) -> T:
        """Return `score` of `batches[place]` with the policy, without the rows on which it fails.

        If a pass with gradient needs all ranks, a rank cannot repeat it alone: its error is raised after the pass.
        """
        if isinstance(self._model, ShardedModel) and torch.is_grad_enabled():
            return score(self._model, batches[place], self._device)
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
            found = failing_rows(self._score, batch)
            if not found:
                continue
            any_found = True
            self.take_out(batches, place, found)
        return any_found

    def _score(self, batch: PaddedBatch) -> None:
        with self._turns.trial():
            score_batch(self._model, batch, self._device)

    @torch.no_grad()
    def _idle(self) -> None:
        score_batch(self._model, empty_batch(), self._device)

    def take_out(self, batches: list[PaddedBatch], place: int, found: Mapping[int, str]) -> None:
        """Replace rows of `batches[place]` by zeros and remember them. found: index of the row -> error text."""
        batch = batches[place]
        batches[place] = neutral(batch, found)
        for row, reason in found.items():
            self._rejected[batch.rows[row].trajectory] = reason
            logger().warning("trajectory not trained on", trajectory=batch.rows[row].trajectory, reason=reason)
