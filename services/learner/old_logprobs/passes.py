"""Passes that score tokens of a batch, each with the weights of its version: the layout and the values.

The layout depends only on the trajectories of a rank. A pass holds tokens of one version. A row ends after its last
token that the pass scores; attention is causal, so later tokens change nothing. The rows of all micro-batches are
split into passes (batching.micro_batches), and a row is in one pass of a version. The layout changes the last bits of
the values; `passes` records it, so that palimpsest/rescore.py can repeat it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import FREE, PaddedBatch, Routes, Row, empty_batch, micro_batches, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.device_batch import packed_rows
from palimpsest.services.learner.model.packing import packs_rows
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.model.routing import as_routes, as_routes_of_packed, recorded
from palimpsest.services.learner.proximal.types import NO_PASS, TRAINING_PASS, RecordedRoutes
from palimpsest.services.learner.sharding.sharded_model import ShardedModel

Wanted = list[NDArray[np.bool_]]
"""For each micro-batch [rows, tokens] bool."""


class BatchScores:
    """The old log-probs of a batch, completed pass by pass."""

    def __init__(
        self,
        batches: Sequence[PaddedBatch],
        device: torch.device,
        *,
        max_tokens: int,
        fresh: int,
        ranks: ProcessGroup | None = None,
        record_routes: bool = False,
    ) -> None:
        """Take the values that came with the rows. -inf is a value: the token's probability underflowed.

        max_tokens: of a pass (batching.micro_batches); fresh: see Source; ranks: None if this process is alone.
        """
        self._batches, self._device, self._max_tokens, self._fresh = batches, device, max_tokens, fresh
        self._ranks = ranks
        self.unknown: Wanted = [np.asarray(batch.mask & np.isnan(batch.old)) for batch in batches]
        """Trainable tokens without a value."""
        self.values = [
            torch.from_numpy(np.where(batch.mask & ~holes, batch.old, np.float32(0))).to(device)
            for batch, holes in zip(batches, self.unknown, strict=True)
        ]
        """[rows, tokens] float32, nats; 0 where there is none."""
        self.passes = [np.full(batch.tokens.shape, NO_PASS, dtype=np.int32) for batch in batches]
        """See Exact."""
        self._count = 0
        self._recorder = RouteRecorder(batches) if record_routes else None

    def of(self, version: Version) -> Wanted:
        """Tokens of this version without a value."""
        return [holes & (batch.versions == version) for holes, batch in zip(self.unknown, self._batches, strict=True)]

    def score_resident(self, model: torch.nn.Module, wanted: Wanted) -> None:
        """Score tokens with the weights that the training starts with.

        The training passes of the fresh micro-batches have these weights, and score their tokens.
        """
        for place in range(self._fresh):
            self.passes[place][wanted[place]] = TRAINING_PASS
            self.unknown[place] &= ~wanted[place]
        none = [np.zeros_like(own) for own in wanted[: self._fresh]]
        self.score(model, [*none, *wanted[self._fresh :]])

    @property
    def routes(self) -> RecordedRoutes | None:
        """See Exact."""
        return None if self._recorder is None else self._recorder.routes

    @property
    def shared(self) -> list[torch.Tensor]:
        """Tokens whose values come from the training passes."""
        return [torch.from_numpy(passes == TRAINING_PASS).to(self._device) for passes in self.passes]

    @torch.no_grad()
    def score(self, model: torch.nn.Module, wanted: Wanted) -> None:
        """Score the wanted tokens with the model's weights. If all ranks must make equally many passes, they all must
        call it."""
        layout = _layout(self._batches, wanted, self._max_tokens, packed=packs_rows(model))
        missing = 0 if self._ranks is None else self._ranks.passes_of_all(len(layout)) - len(layout)
        for rows, batch in layout:
            scored, routes = self._scored(model, batch)
            for i, (place, index) in enumerate(rows):
                own = np.flatnonzero(batch.mask[i])
                chosen = torch.from_numpy(own).to(self._device)
                self.values[place][index, chosen] = scored[i, chosen]
                self.passes[place][index, own] = self._count
                self.unknown[place][index, own] = False
                if self._recorder is not None and routes is not None:
                    self._recorder.add(place, index, own, routes[i])
            self._count += 1
        for _ in range(missing):
            score_batch(model, empty_batch(), self._device)

    def _scored(self, model: torch.nn.Module, batch: PaddedBatch) -> tuple[torch.Tensor, Routes | None]:
        if self._recorder is None:
            return score_batch(model, batch, self._device), None
        with recorded(model) as found:
            scored = score_batch(model, batch, self._device)
        if isinstance(model, ShardedModel) and model.errors.any_deferred:
            return scored, None  # the batch is scored again without the row that fails
        rows = packed_rows(model, batch, self._device)
        if rows is None:
            return scored, as_routes(found, len(batch.rows))
        return scored, as_routes_of_packed(model, found, batch.tokens.shape, rows)


class RouteRecorder:
    """The experts of the passes that scored the tokens, for the training passes.

    Position p gets those of the pass that scored the next trainable token after p. Other positions stay FREE.
    """

    def __init__(self, batches: Sequence[PaddedBatch]) -> None:
        self._next = [next_trainable(batch.mask) for batch in batches]
        self.routes: RecordedRoutes = [None] * len(batches)

    def add(self, place: int, index: int, scored: NDArray[np.intp], routes: Routes) -> None:
        """Take those of a row of a pass.

        scored: indexes of the tokens; routes: [length, layers, experts of a token].
        """
        following = self._next[place]
        if (own := self.routes[place]) is None:
            own = self.routes[place] = np.full((*following.shape, *routes.shape[1:]), FREE, dtype=np.int16)
        positions = np.flatnonzero(np.isin(following[index], scored))
        own[index, positions] = routes[positions]


def next_trainable(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the index of the next trainable token after each position, the row's length if there is none.

    mask: [rows, tokens]

    >>> next_trainable(np.array([[False, True, False, True, False]])).tolist()
    [[1, 3, 3, 5, 5]]
    """
    length = mask.shape[1]
    own = np.where(mask, np.arange(length), length)
    from_here = np.minimum.accumulate(own[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([from_here[:, 1:], np.full((len(mask), 1), length)], axis=1)


def _layout(
    batches: Sequence[PaddedBatch], wanted: Wanted, max_tokens: int, *, packed: bool
) -> list[tuple[list[tuple[int, int]], PaddedBatch]]:
    """Passes that score the wanted tokens: the micro-batch and index of each row, and the padded rows."""
    cut: dict[Row, tuple[int, int]] = {}
    for place, (batch, own) in enumerate(zip(batches, wanted, strict=True)):
        for index in np.flatnonzero(own.any(axis=1)).tolist():
            cut[cut_row(batch.rows[index], own[index])] = (place, index)
    together = micro_batches(list(cut), max_tokens=max_tokens, packed=packed)
    return [([cut[row] for row in rows], pad(rows)) for rows in together]


def cut_row(row: Row, wanted: NDArray[np.bool_]) -> Row:
    """Return the row up to its last wanted token (at least one), with only wanted tokens trainable. wanted: bool, at
    least [tokens]."""
    stop = int(np.flatnonzero(wanted)[-1]) + 1
    return replace(
        row,
        tokens=row.tokens[:stop],
        versions=np.where(wanted[:stop], row.versions[:stop], np.int32(UNTRAINABLE)),
        behavior=row.behavior[:stop],
        routes=None if row.routes is None else row.routes[:stop],
        old=None,
    )
