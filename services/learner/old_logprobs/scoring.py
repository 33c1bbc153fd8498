"""Log-probs of tokens by one set of weights: the forward passes behind every exact source.

Attention is causal, so what stands behind a token changes nothing, and a row may be cut after the last token that is
asked for. What does change the last bits is the layout: which rows share a pass, and how far they are padded.
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
from palimpsest.services.learner.model.policy import score_batch


def known(batch: PaddedBatch, device: torch.device) -> tuple[Tensor, NDArray[np.bool_]]:
    """What `old` of the batch says already, 0 elsewhere, and which trainable tokens it leaves open.

    Both [rows, tokens], float32 (nats) and bool. A known -inf is known: the token's probability underflowed.
    """
    unknown = batch.mask & np.isnan(batch.old)
    values = np.where(batch.mask & ~unknown, batch.old, np.float32(0))
    return torch.from_numpy(values).to(device), unknown


@torch.no_grad()
def fill(model: torch.nn.Module, batch: PaddedBatch, wanted: NDArray[np.bool_], values: Tensor) -> None:
    """Write the model's log-probs into `values` where they are wanted, both [rows, tokens].

    Rows of which nothing is wanted are left out of the pass.
    """
    places = np.flatnonzero(wanted.any(axis=1)).tolist()
    if not places:
        return
    part = batch if len(places) == len(batch.rows) else pad([batch.rows[place] for place in places])
    scored, _ = score_batch(model, part, values.device)
    length = part.tokens.shape[1]
    chosen = torch.from_numpy(wanted[places, :length]).to(values.device)
    values[places, :length] = torch.where(chosen, scored, values[places, :length])


def rows_by_version(
    trajectory: str, tokens: Int32Array, segments: Sequence[Segment], temperature: float
) -> dict[Version, Row]:
    """For each version of the segments, a row to score by it: cut after its last token, no other version's trainable.

    tokens: [length], at least up to the last segment's end.
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
    """Rows with the model's log-probs [tokens], 0 where untrainable; as each forward pass is done.

    batch_tokens: most tokens of a pass, padding included. Raises ValueError when the rows are of several versions.
    """
    if len(versions := versions_present(rows)) > 1:
        raise ValueError(f"one model cannot give the old log-probs of versions {versions}: score each by its own")
    for together in micro_batches(rows, max_tokens=batch_tokens):
        batch = pad(together)
        values = torch.zeros(batch.tokens.shape, device=device)
        fill(model, batch, batch.mask, values)
        scored = values.cpu().numpy()
        yield [(row, scored[i, : len(row.tokens)]) for i, row in enumerate(together)]


def _row(trajectory: str, tokens: Int32Array, versions: Int32Array, temperature: float) -> Row:
    """Only what scoring needs."""
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
