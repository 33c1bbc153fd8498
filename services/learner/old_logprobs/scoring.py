"""Log-probs of tokens under one set of weights: the forward passes of every exact source.

Attention is causal: later tokens do not change the log-prob of a token, so a row can end after the last token to be
scored. The layout (which rows share a pass, and the padded length) changes the last bits.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.arrays import Float32Array, Int32Array
from palimpsest.common.trajectory import Segment, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad, versions_present
from palimpsest.services.learner.model.failing_rows import tolerant
from palimpsest.services.learner.model.policy import score_batch


def known(batch: PaddedBatch, device: torch.device) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return the old log-probs that the batch holds, 0 elsewhere, and a mask of trainable tokens without a value.

    Both [rows, tokens], float32 (nats) and bool. -inf is a value: the token's probability underflowed.
    """
    unknown = batch.mask & np.isnan(batch.old)
    values = np.where(batch.mask & ~unknown, batch.old, np.float32(0))
    return torch.from_numpy(values).to(device), unknown


@torch.no_grad()
def fill(model: torch.nn.Module, batch: PaddedBatch, wanted: NDArray[np.bool_], values: Tensor) -> None:
    """Write the model's log-probs into `values` where `wanted` is True, both [rows, tokens].

    The pass leaves out rows in which no token is wanted.
    """
    indices = np.flatnonzero(wanted.any(axis=1)).tolist()
    if not indices:
        return
    part = batch if len(indices) == len(batch.rows) else pad([batch.rows[index] for index in indices])
    length = part.tokens.shape[1]
    own = wanted[indices, :length]
    scored = score_batch(model, part, values.device, wanted=own)
    chosen = torch.from_numpy(own).to(values.device)
    values[indices, :length] = torch.where(chosen, scored, values[indices, :length])


def rows_by_version(
    trajectory: str, tokens: Int32Array, segments: Sequence[Segment], temperature: float
) -> dict[Version, Row]:
    """For each version of the segments, a row to score with its weights.

    The row ends after the version's last token, and only the version's tokens are trainable in it. tokens: [length], at
    least up to the last segment's end.
    """
    versions = token_versions(segments, len(tokens))
    rows = {}
    for segment in segments:
        if segment.version not in rows:
            own = np.where(versions == segment.version, versions, UNTRAINABLE).astype(np.int32)
            stop = int(np.flatnonzero(own != UNTRAINABLE)[-1]) + 1
            rows[segment.version] = _row(trajectory, tokens[:stop], own[:stop], temperature)
    return rows


def score(
    model: torch.nn.Module, rows: Sequence[Row], *, device: torch.device, batch_tokens: int
) -> Iterator[list[tuple[Row, Float32Array]]]:
    """Yield the rows of each forward pass with the model's log-probs [tokens], 0 where untrainable.

    The log-probs of a row on which the pass fails are NaN.

    batch_tokens: maximum tokens of a pass, padding included. Raises ValueError if the rows are of several versions.
    """
    if len(versions := versions_present(rows)) > 1:
        raise ValueError(
            f"rows are of versions {versions}: one model scores one version, so score each version separately"
        )
    for together in micro_batches(rows, max_tokens=batch_tokens):
        batch = pad(together)
        values = torch.zeros(batch.tokens.shape, device=device)
        _fill_or_nan(model, batch, values)
        scored = values.cpu().numpy()
        yield [(row, scored[i, : len(row.tokens)]) for i, row in enumerate(together)]


def _fill_or_nan(model: torch.nn.Module, batch: PaddedBatch, values: Tensor) -> None:
    """Write the log-probs of the trainable tokens into `values`; NaN for the rows on which the pass fails."""

    def score(part: PaddedBatch) -> Float32Array:
        scored = torch.zeros(part.tokens.shape, device=values.device)
        fill(model, part, part.mask, scored)
        array: Float32Array = scored.cpu().numpy()
        return array

    values.copy_(torch.from_numpy(tolerant(score)(batch)))


def _row(trajectory: str, tokens: Int32Array, versions: Int32Array, temperature: float) -> Row:
    """A row for scoring only. Reward, advantage and behavior log-probs are 0."""
    return Row(
        trajectory=trajectory,
        tokens=tokens,
        versions=versions,
        behavior=np.zeros(len(tokens), dtype=np.float32),
        temperature=temperature,
        advantage=0.0,
        reward=0.0,
        success=False,
    )
