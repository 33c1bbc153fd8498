"""Convert a model's named tensors to bytes for the store, and load such bytes into a model."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from palimpsest.common.snapshots.client import RawTensor

Weights = dict[str, Tensor]


def named_weights(model: torch.nn.Module) -> Weights:
    """Return the model's tensors by checkpoint name. Tied tensors appear once, under the first name."""
    seen: set[int] = set()
    weights: Weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        weights[name] = tensor.detach()
    return weights


def raw_tensors(weights: Weights) -> Iterator[RawTensor]:
    """Yield each tensor as bytes for the store."""
    for name, tensor in weights.items():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        yield RawTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)


def load_weights(model: torch.nn.Module, tensors: Iterable[RawTensor]) -> None:
    """Overwrite the model's weights in place. Raises ValueError if names, types or shapes differ."""
    weights = named_weights(model)
    missing = set(weights)
    with torch.no_grad():
        for tensor in tensors:
            own = weights.get(tensor.name)
            if own is None or tuple(own.shape) != tensor.shape or str(own.dtype) != f"torch.{tensor.dtype}":
                raise ValueError(f"the model has no tensor {tensor.name} {tensor.dtype} {tensor.shape}")
            own.copy_(torch.from_numpy(tensor.raw.copy()).view(own.dtype).reshape(own.shape))
            missing.discard(tensor.name)
    if missing:
        raise ValueError(f"missing tensors: {', '.join(sorted(missing)[:5])}")
