"""Convert a model's named tensors to bytes for the store, and load such bytes into a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.snapshots.adapter import Adapter, refuse_other_adapter
from palimpsest.common.snapshots.client import RawTensor
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.manifest import Manifest, TensorEntry
from palimpsest.services.learner.model.checkpoint_names import checkpoint_tensors
from palimpsest.services.learner.model.lora import adapter_weights

Weights = dict[str, Tensor]


def named_weights(model: torch.nn.Module) -> Weights:
    """Return views of the model's tensors by checkpoint name. Tied tensors appear once, under the first name.

    Of a model with an adapter: the tensors of the adapter, by the names of peft.
    """
    adapter = adapter_weights(model)
    return checkpoint_tensors(model, _own_weights(model)) if adapter is None else adapter


def raw_tensors(weights: Weights) -> Iterator[RawTensor]:
    """Yield each tensor as bytes for the store."""
    for name, tensor in weights.items():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        yield RawTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)


def as_tensor(tensor: RawTensor) -> Tensor:
    """Return a stored tensor, copied, in its own type."""
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return torch.from_numpy(tensor.raw.copy()).view(dtype).reshape(tensor.shape)


def load_weights(model: torch.nn.Module, tensors: Iterable[RawTensor]) -> None:
    """Overwrite the model's weights in place. Raises ValueError if names, types or shapes differ.

    Tensors under the model's own names are accepted, too: earlier releases stored them so.
    """
    weights = named_weights(model)
    own = _own_weights(model) if adapter_weights(model) is None else weights
    missing = {name: weight.data_ptr() for name, weight in weights.items()}
    with torch.no_grad():
        for tensor in tensors:
            target = weights.get(tensor.name, own.get(tensor.name))
            if target is None or tuple(target.shape) != tensor.shape or str(target.dtype) != f"torch.{tensor.dtype}":
                raise ValueError(f"the model has no tensor {tensor.name} {tensor.dtype} {tensor.shape}")
            target.copy_(as_tensor(tensor))
            if missing.pop(tensor.name, None) is None:
                stop = target.data_ptr() + target.numel() * target.element_size()
                missing = {name: at for name, at in missing.items() if not target.data_ptr() <= at < stop}
    if missing:
        raise ValueError(f"missing tensors: {', '.join(sorted(missing)[:5])}")


class EditableModel:
    """The model's weights, for a Walker to move from version to version in place (common/snapshots/walker.py)."""

    def __init__(self, model: torch.nn.Module, adapter: Adapter | None = None) -> None:
        """adapter: of the model; None if its weights are whole."""
        self._model, self._adapter = model, adapter
        self._weights: Weights = {}
        self._bytes: dict[str, Bytes] = {}
        """Views of the tensors that can be changed in place. Making one takes as long as patching a small tensor."""

    def load(self, tensors: Iterator[RawTensor], manifest: Manifest) -> None:
        """See WeightsCopy. Raises UserError if the version has another adapter."""
        refuse_other_adapter(manifest.adapter, self._adapter, f"version {manifest.version}")
        load_weights(self._model, tensors)

    @contextmanager
    def editing(self, entry: TensorEntry) -> Iterator[Bytes]:
        """See WeightsCopy. A tensor on another device, or not in C order, is copied and written back."""
        tensor = self._tensor(entry)
        if (own := self._bytes.get(entry.name)) is not None:
            yield own
            return
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            yield self._bytes.setdefault(entry.name, tensor.reshape(-1).view(torch.uint8).numpy())
            return
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        before = raw.copy()
        yield raw
        if not np.array_equal(raw, before):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).reshape(tensor.shape))

    def _tensor(self, entry: TensorEntry) -> Tensor:
        if entry.name not in self._weights:
            adapter = adapter_weights(self._model)
            self._weights = _own_weights(self._model) | named_weights(self._model) if adapter is None else adapter
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
