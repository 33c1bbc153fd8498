"""Convert a model's named tensors to bytes for the store, and load such bytes into a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.snapshots.client import RawTensor
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.manifest import Manifest, TensorEntry
from palimpsest.services.learner.model.checkpoint_names import checkpoint_tensors

Weights = dict[str, Tensor]


def named_weights(model: torch.nn.Module) -> Weights:
    """Return views of the model's tensors by checkpoint name. Tied tensors appear once, under the first name."""
    return checkpoint_tensors(model, _own_weights(model))


def raw_tensors(weights: Weights) -> Iterator[RawTensor]:
    """Yield each tensor as bytes for the store."""
    for name, tensor in weights.items():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        yield RawTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)


def load_weights(model: torch.nn.Module, tensors: Iterable[RawTensor]) -> None:
    """Overwrite the model's weights in place. Raises ValueError if names, types or shapes differ.

    Tensors under the model's own names are accepted, too: earlier releases stored them so.
    """
    weights, own = named_weights(model), _own_weights(model)
    missing = {name: weight.data_ptr() for name, weight in weights.items()}
    with torch.no_grad():
        for tensor in tensors:
            target = weights.get(tensor.name, own.get(tensor.name))
            if target is None or tuple(target.shape) != tensor.shape or str(target.dtype) != f"torch.{tensor.dtype}":
                raise ValueError(f"the model has no tensor {tensor.name} {tensor.dtype} {tensor.shape}")
            target.copy_(torch.from_numpy(tensor.raw.copy()).view(target.dtype).reshape(target.shape))
            if missing.pop(tensor.name, None) is None:
                stop = target.data_ptr() + target.numel() * target.element_size()
                missing = {name: at for name, at in missing.items() if not target.data_ptr() <= at < stop}
    if missing:
        raise ValueError(f"missing tensors: {', '.join(sorted(missing)[:5])}")


class EditableModel:
    """The model's weights, for a Walker to move from version to version in place (common/snapshots/walker.py)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._weights: Weights = {}

    def load(self, tensors: Iterator[RawTensor], _manifest: Manifest) -> None:
        """See WeightsCopy."""
        load_weights(self._model, tensors)

    @contextmanager
    def editing(self, entry: TensorEntry) -> Iterator[Bytes]:
        """See WeightsCopy. A tensor on another device, or not in C order, is copied and written back."""
        tensor = self._tensor(entry)
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            yield tensor.reshape(-1).view(torch.uint8).numpy()
            return
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        before = raw.copy()
        yield raw
        if not np.array_equal(raw, before):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).reshape(tensor.shape))

    def _tensor(self, entry: TensorEntry) -> Tensor:
        if entry.name not in self._weights:
            self._weights = _own_weights(self._model) | named_weights(self._model)
        tensor = self._weights.get(entry.name)
        if tensor is None or tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
            raise ValueError(f"the model has no tensor {entry.name} {entry.dtype} {entry.shape}")
        return tensor


def _own_weights(model: torch.nn.Module) -> Weights:
    """The model's tensors by its own names. Tied tensors appear once, under the first name."""
    seen: set[int] = set()
    weights: Weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        weights[name] = tensor.detach()
    return weights
