"""Writes every trained batch with all its log-probs and its layout, so that the values can be checked.

    records/00000012.npz    of the version trained at

For micro-batch i: tokens_i, versions_i, behavior_i, proximal_i, current_i, advantages_i [rows, length]; exact_i (the
proximal is the old log-prob) and missing_i (there is no proximal), bool [rows, length]; temperatures_i [rows, 1];
trajectories_i and lengths_i (in tokens) [rows]; first_i: whether current_i is of the version trained at; removed_i,
uint64 [rows, length]: bit b is set where cause b removed the token from the loss; passes_i [rows, length]: number of
the forward pass that gave the old log-prob, -2 for the training's own pass, -1 if the value came with the row or there
is none. A pass may hold rows of several micro-batches: those with one of its tokens, each up to its last one, sorted by
length and trajectory. With learner.routing_replay: routes_i, int16 [rows, length, layers, experts of a token], the
experts that the training pass replayed, -1 where the routers chose. For the batch: now, the version trained at; causes,
the names of the causes by bit.
palimpsest/rescore.py and common/page/records.py read these files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.files import atomic_write
from palimpsest.services.learner.observability.version_record import Batch
from palimpsest.services.learner.proximal.types import NO_PASS
from palimpsest.services.learner.training.results import MicroBatchResult, StepResult


class BatchDump:
    """Writes the batches of a run into one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def record(self, batch: Batch, trained: StepResult) -> None:
        """Write the file of the version. A restart that trains the version again overwrites it."""
        causes = sorted({cause for result in trained.micro_batches for cause in _causes(result)})
        arrays: dict[str, NDArray[Any]] = {"now": np.array(batch.version), "causes": np.array(causes, dtype=np.str_)}
        for i, result in enumerate(trained.micro_batches):
            padded = result.batch
            arrays |= {
                f"tokens_{i}": padded.tokens,
                f"versions_{i}": padded.versions,
                f"behavior_{i}": padded.behavior,
                f"proximal_{i}": result.proximal.numpy(),
                f"exact_{i}": result.anchor.exact.numpy(),
                f"missing_{i}": result.anchor.missing.numpy(),
                f"current_{i}": result.current.numpy(),
                f"temperatures_{i}": padded.temperatures,
                f"advantages_{i}": result.advantages.numpy(),
                f"lengths_{i}": np.array([len(row.tokens) for row in padded.rows]),
                f"trajectories_{i}": np.array([row.trajectory for row in padded.rows]),
                f"first_{i}": np.array(result.first),
                f"removed_{i}": _bits(result, causes),
                f"passes_{i}": np.full(padded.tokens.shape, NO_PASS) if result.passes is None else result.passes,
            }
            if padded.routes is not None:
                arrays[f"routes_{i}"] = padded.routes
        with atomic_write(self._folder / f"{batch.version:08d}.npz") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def _causes(result: MicroBatchResult) -> dict[str, Tensor]:
    return result.correction.causes | result.clipped


def _bits(result: MicroBatchResult, causes: Sequence[str]) -> NDArray[np.uint64]:
    """Return the causes of each token as bits, 0 where it is untrainable or kept."""
    found = np.zeros(result.batch.tokens.shape, dtype=np.uint64)
    for cause, removed in _causes(result).items():
        found |= np.where(removed.numpy() & result.batch.mask, np.uint64(1 << causes.index(cause)), np.uint64(0))
    return found
