"""From trajectories to the arrays a forward pass takes. Pure.

The layout (which rows go together, and their padded length) depends on the trajectories only, so that a pass can be
repeated bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.arrays import Float32Array, Int32Array
from palimpsest.common.versions import UNTRAINABLE, Version


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A trajectory ready for training. Arrays are [tokens]; index t belongs to token t."""

    trajectory: str
    tokens: Int32Array
    versions: Int32Array
    """UNTRAINABLE where no segment covers the token."""
    behavior: Float32Array
    """nats; 0 where untrainable."""
    temperature: float
    advantage: float
    reward: float
    success: bool
    old: Float32Array | None = None
    """Old log-probs that are known, nats; NaN where they are not. None: none are known."""

    @property
    def trainable(self) -> int:
        """Tokens that count in the loss."""
        return int((self.versions != UNTRAINABLE).sum())


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Rows of one forward pass, padded on the right. Arrays are [rows, longest]."""

    rows: tuple[Row, ...]
    tokens: NDArray[np.int64]
    versions: Int32Array
    behavior: Float32Array
    advantages: Float32Array
    temperatures: Float32Array
    """[rows, 1]"""
    old: Float32Array
    """Old log-probs that are known, nats; NaN elsewhere."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Trainable tokens."""
        covered: NDArray[np.bool_] = self.versions != UNTRAINABLE
        return covered


def micro_batches(rows: Sequence[Row], *, max_tokens: int) -> list[list[Row]]:
    """Lists of rows of similar length, each within max_tokens once padded (a longer row is alone in its list).

    Sorted by length, then id: the same rows give the same lists in any order.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (len(row.tokens), row.trajectory)):
        # ascending lengths: the newest row is the longest, so it sets the padded length
        if batches and (len(batches[-1]) + 1) * len(row.tokens) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pad(rows: Sequence[Row]) -> PaddedBatch:
    """The rows as rectangular arrays. Padding is token 0 and untrainable."""
    longest = max(len(row.tokens) for row in rows)
    shape = (len(rows), longest)
    tokens = np.zeros(shape, dtype=np.int64)
    versions = np.full(shape, UNTRAINABLE, dtype=np.int32)
    behavior = np.zeros(shape, dtype=np.float32)
    old = np.full(shape, np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        versions[i, :length] = row.versions
        behavior[i, :length] = row.behavior
        if row.old is not None:
            old[i, :length] = row.old
    return PaddedBatch(
        rows=tuple(rows),
        tokens=tokens,
        versions=versions,
        behavior=behavior,
        advantages=np.repeat(np.array([[row.advantage] for row in rows], dtype=np.float32), longest, axis=1),
        temperatures=np.array([[row.temperature] for row in rows], dtype=np.float32),
        old=old,
    )


def versions_present(rows: Sequence[Row]) -> list[Version]:
    """Versions that sampled any token of the rows, ascending."""
    present = np.unique(np.concatenate([row.versions for row in rows])) if rows else np.array([], dtype=np.int32)
    return [Version(int(v)) for v in present if v != UNTRAINABLE]


def partition_by_rank(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """One share for each rank, of about equal length: sorted by length, longest first, and distributed in turn."""
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.trajectory))
    return [ordered[rank::ranks] for rank in range(ranks)]
