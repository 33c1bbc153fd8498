"""The tensors of a padded batch on a device, made once for all passes over it.

Training, reference, critic and the sources of the proximal read the same tensors. Nothing may change them in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.packing import PackedRows, packs_rows


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """See PaddedBatch; [rows, tokens] each."""

    tokens: Tensor
    """int64"""
    mask: Tensor
    """bool: trainable tokens."""
    behavior: Tensor
    temperatures: Tensor
    """[rows, 1]"""
    rows: PackedRows


def on_device(batch: PaddedBatch, device: torch.device) -> DeviceBatch:
    """Return the batch's tensors on this device. The batch keeps them for the next call."""
    kept: DeviceBatch | None = batch.on_devices.get(device)
    if kept is None:
        kept = batch.on_devices[device] = _moved(batch, device)
    return kept


def packed_rows(model: torch.nn.Module, batch: PaddedBatch, device: torch.device) -> PackedRows | None:
    """Return where the tokens of the model's pass over this batch are; None if its passes are padded."""
    return on_device(batch, device).rows if packs_rows(model) else None


def _moved(batch: PaddedBatch, device: torch.device) -> DeviceBatch:
    tokens, mask, behavior, temperatures = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.mask, batch.behavior, batch.temperatures)
    )
    rows = PackedRows.of([len(row.tokens) for row in batch.rows], batch.tokens.shape[1], device)
    return DeviceBatch(tokens, mask, behavior, temperatures, rows)
