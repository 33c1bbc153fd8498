"""Log-probs of tokens under one set of weights: the forward passes of a replica.

Attention is causal: later tokens do not change the log-prob of a token, so a row can end after the last token to be
scored. The layout (which rows share a pass, and the padded length) changes the last bits.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from palimpsest.common.arrays import Float32Array, Int32Array
from palimpsest.common.trajectory import Segment, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import Row, micro_batches, pad, versions_present
from palimpsest.services.learner.model.failing_rows import tolerant
from palimpsest.services.learner.model.packing import packs_rows
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer


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
    forward = tolerant(model_scorer(model, device))
    for together in micro_batches(rows, max_tokens=batch_tokens, packed=packs_rows(model)):
        scored = forward(pad(together))
        yield [(row, scored[i, : len(row.tokens)]) for i, row in enumerate(together)]


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
