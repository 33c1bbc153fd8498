"""Finds the rows of a micro-batch on which a pass fails.

An error belongs to a row if a pass over that row alone fails while a pass over token 0 instead succeeds. Errors of
the process or the device (memory, accelerator, communication) never belong to a row: after them no pass tells anything.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from palimpsest.common.arrays import Float32Array
from palimpsest.common.logs import logger
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, pad
from palimpsest.services.learner.distributed import OtherRankFailed

Forward = Callable[[PaddedBatch], object]
ErrorOf = Callable[[Sequence[int]], Exception | None]
MACHINE = (MemoryError, OSError, UserError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of the process, the device or the run."""
MACHINE_TEXTS = ("out of memory", "can't allocate memory", "CUDA", "CUBLAS", "cuDNN", "NCCL", "gloo", "HIP error")
"""Texts of a RuntimeError of the device: torch has no class for each."""


def may_be_of_row(error: Exception) -> bool:
    """Whether a row can have caused this error.

    >>> may_be_of_row(IndexError("index out of range in self")), may_be_of_row(MemoryError())
    (True, False)
    >>> may_be_of_row(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    False
    """
    return not isinstance(error, MACHINE) and not any(text in str(error) for text in MACHINE_TEXTS)


def failing_rows(forward: Forward, batch: PaddedBatch) -> dict[int, str]:
    """Return the rows whose passes fail, found by bisection: index -> error text. {} if the error belongs to no row.

    Raises the errors that belong to the machine.
    """
    control = replace(batch.rows[0], tokens=np.zeros_like(batch.rows[0].tokens))
    return failing_places(lambda kept: _error(forward, [batch.rows[row] for row in kept] or [control]), len(batch.rows))


def failing_places(error_of: ErrorOf, rows: int) -> dict[int, str]:
    """Return the rows that fail, found by bisection: index -> error text. {} if the error belongs to no row.

    error_of: returns the error of a pass over these rows; of none: over zeros, which belongs to no row.

    >>> failing_places(lambda kept: ValueError("no") if 2 in kept else None, 5)
    {2: 'ValueError: no'}
    >>> failing_places(lambda kept: ValueError("no"), 5)
    {}
    """
    found: dict[int, str] = {}
    _bisect(error_of, range(rows), found)
    return found if found and error_of(()) is None else {}


def neutral(batch: PaddedBatch, rows: Collection[int]) -> PaddedBatch:
    """Return the batch with zeros in place of these rows, in the same shape: they contribute nothing."""
    at = list(rows)
    arrays = {name: getattr(batch, name).copy() for name in ("tokens", "versions", "behavior", "old")}
    for name, value in {"tokens": 0, "versions": UNTRAINABLE, "behavior": 0, "old": np.nan}.items():
        arrays[name][at] = value
    return replace(batch, rows=tuple(_zeros(row) if i in at else row for i, row in enumerate(batch.rows)), **arrays)


def tolerant(forward: Callable[[PaddedBatch], Float32Array]) -> Callable[[PaddedBatch], Float32Array]:
    """Return a function like `forward` that gives NaN for the rows on which `forward` fails."""

    def score(batch: PaddedBatch) -> Float32Array:
        try:
            return forward(batch)
        except Exception as error:
            if not may_be_of_row(error) or not (found := failing_rows(forward, batch)):
                raise
            for row, reason in found.items():
                logger().warning("trajectory not scored", trajectory=batch.rows[row].trajectory, reason=reason)
            values = forward(neutral(batch, found))
            values[list(found)] = np.nan
            return values

    return score


def _bisect(error_of: ErrorOf, places: range, found: dict[int, str]) -> None:
    error = error_of(places)
    if error is None:
        return
    if len(places) == 1:
        found[places[0]] = str(error) if isinstance(error, OtherRankFailed) else f"{type(error).__name__}: {error}"
        return
    middle = len(places) // 2
    _bisect(error_of, places[:middle], found)
    _bisect(error_of, places[middle:], found)


def _error(forward: Forward, rows: list[Row]) -> Exception | None:
    """The error of a pass over these rows alone. Raises the errors that belong to the machine."""
    try:
        with torch.no_grad():
            forward(pad(rows))
    except Exception as error:
        if not may_be_of_row(error):
            raise
        return error
    return None


def _zeros(row: Row) -> Row:
    return replace(
        row, tokens=np.zeros_like(row.tokens), versions=np.full_like(row.versions, UNTRAINABLE),
        behavior=np.zeros_like(row.behavior), old=None, routes=None,
    )  # fmt: skip
