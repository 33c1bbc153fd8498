"""Convert a model's named tensors to bytes for the store, and load such bytes into a model."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from palimpsest.common.snapshots.client import RawTensor
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
