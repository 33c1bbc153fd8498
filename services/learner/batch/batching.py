"""Pack trajectories into the arrays of a forward pass. Pure.

The layout (the rows of a pass and their padded length) depends only on the trajectories. A pass with the same layout
gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.arrays import Float32Array, Int32Array
from palimpsest.common.routes import FREE as FREE, Routes as Routes
from palimpsest.common.versions import UNTRAINABLE, Version

PASS_TOKENS = 256
"""Cost of a further pass, in tokens: another pass pays off where it saves more padding than this. Measured with the
starting model on one core: 11 ms for a pass and 0.045 ms for a token, forward and backward."""
RECTANGLE_ENTRIES = 64
"""Entries of the loss's rectangles [rows, length] that cost as much as a token of a packed pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One trajectory as arrays of shape [tokens]. Index t belongs to token t."""

    trajectory: str
    tokens: Int32Array
    versions: Int32Array
    """The version that sampled each token; UNTRAINABLE where no segment covers the token."""
    behavior: Float32Array
    """Behavior log-probs in nats; 0 where untrainable."""
    temperature: float
    advantage: float
    reward: float
    success: bool
    group: str = ""
    """Group of the trajectory."""
    truncated: bool = False
    """Whether a limit on turns or tokens ended the trajectory."""
    old: Float32Array | None = None
    """Old log-probs in nats; NaN where a token has none. None if no token has one."""
    routes: Routes | None = None
    """Experts to replay, [tokens, layers, experts of a token]. None: the routers choose."""

    @property
    def trainable(self) -> int:
        """Number of trainable tokens."""
        return int((self.versions != UNTRAINABLE).sum())


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Rows of one forward pass, padded on the right. Arrays have shape [rows, length of the longest row]."""

    rows: tuple[Row, ...]
    tokens: NDArray[np.int64]
    versions: Int32Array
    behavior: Float32Array
    advantages: Float32Array
    temperatures: Float32Array
    """Sampling temperatures, [rows, 1]."""
    old: Float32Array
    """Old log-probs in nats; NaN where a token has none."""
    routes: Routes | None = None
    """Experts to replay, [rows, length, layers, experts of a token]. None: the routers choose."""
    on_devices: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """Device -> tensors of this batch there (model/device_batch.py). A batch made by `replace` starts without any."""

    @property
    def is_empty(self) -> bool:
        """Whether it is `empty_batch()`."""
        return self.rows == (_NO_ROW,)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True at trainable tokens, [rows, length of the longest row]."""
        covered: NDArray[np.bool_] = self.versions != UNTRAINABLE
        return covered


def micro_batches(rows: Sequence[Row], *, max_tokens: int, packed: bool = False) -> list[list[Row]]:
    """Split rows into lists of similar length, so that the passes cost least.

    A pass costs its tokens, padding included, and PASS_TOKENS. A list has at most max_tokens tokens, padding included;
    a row longer than max_tokens has a list to itself. Rows are sorted by length, then id, so the input order does not
    change the lists. packed: passes have no padding, which then counts for the limit no token, and for the cost 1 /
    RECTANGLE_ENTRIES of one: the loss still works on rectangles.
    """
    ordered = sorted(rows, key=lambda row: (len(row.tokens), row.trajectory))
    lengths = np.array([max(1, len(row.tokens)) for row in ordered], dtype=np.int64)
    before = np.concatenate(([0], np.cumsum(lengths)))
    """[i]: tokens of the first i rows."""
    pass_cost = PASS_TOKENS * RECTANGLE_ENTRIES if packed else PASS_TOKENS
    least = np.zeros(len(ordered) + 1, dtype=np.int64)
    """[i]: the cost of the first i rows."""
    start = [0] * (len(ordered) + 1)
    """[i]: the first row of the list that ends before row i."""
    for end in range(1, len(ordered) + 1):
        # Rows come in ascending length: the last one sets the padded length.
        length = int(lengths[end - 1])
        most = int(np.searchsorted(before, before[end] - max_tokens)) if packed else end - max_tokens // length
        first = max(0, min(end - 1, most))
        costs = least[first:end] + np.arange(end - first, 0, -1) * length
        start[end] = first + int(costs.argmin())
        least[end] = costs.min() + pass_cost
    batches: list[list[Row]] = []
    end = len(ordered)
    while end:
        batches.append(ordered[start[end] : end])
        end = start[end]
    return batches[::-1]


def pad(rows: Sequence[Row]) -> PaddedBatch:
    """Pad rows on the right to rectangular arrays. Padding is token 0 and untrainable."""
    longest = max(len(row.tokens) for row in rows)
    shape = (len(rows), longest)
    tokens = np.zeros(shape, dtype=np.int64)
    versions = np.full(shape, UNTRAINABLE, dtype=np.int32)
    behavior = np.zeros(shape, dtype=np.float32)
    old = np.full(shape, np.nan, dtype=np.float32)
    routes: Routes | None = None
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        versions[i, :length] = row.versions
        behavior[i, :length] = row.behavior
        if row.old is not None:
            old[i, :length] = row.old
        if row.routes is not None:
            if routes is None:
                routes = np.full((*shape, *row.routes.shape[1:]), FREE, dtype=np.int16)
            routes[i, :length] = row.routes
    return PaddedBatch(
        rows=tuple(rows),
        tokens=tokens,
        versions=versions,
        behavior=behavior,
        advantages=np.repeat(np.array([[row.advantage] for row in rows], dtype=np.float32), longest, axis=1),
        temperatures=np.array([[row.temperature] for row in rows], dtype=np.float32),
        old=old,
        routes=routes,
    )


def empty_batch() -> PaddedBatch:
    """Return a batch without a trainable token: a pass over it contributes nothing.

    A rank makes such passes where other ranks have more rows and all ranks must make equally many passes.
    """
    return pad([_NO_ROW])


def versions_present(rows: Sequence[Row]) -> list[Version]:
    """Versions that sampled at least one token of the rows, ascending."""
    present = np.unique(np.concatenate([row.versions for row in rows])) if rows else np.array([], dtype=np.int32)
    return [Version(int(v)) for v in present if v != UNTRAINABLE]


def partition_by_rank(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Split rows into one share for each rank: sort by length, longest first, and deal them in turn."""
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.trajectory))
    return [ordered[rank::ranks] for rank in range(ranks)]


_NO_ROW = Row(
    trajectory="",
    tokens=np.zeros(2, dtype=np.int32),
    versions=np.full(2, UNTRAINABLE, dtype=np.int32),
    behavior=np.zeros(2, dtype=np.float32),
    temperature=1.0,
    advantage=0.0,
    reward=0.0,
    success=False,
)
