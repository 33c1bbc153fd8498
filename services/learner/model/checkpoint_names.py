"""The checkpoint's names for the tensors of a model in memory.

transformers keeps some architectures in another form than their checkpoints: it fuses the experts of a layer into one
tensor. A version in the store is a checkpoint, so it uses the checkpoint's names.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from palimpsest.common.user_error import UserError

PartNames = str | tuple[str, ...]
"""The checkpoint's name of a tensor of the model, or those of its parts: for all experts one chunk after another."""
_parts: WeakKeyDictionary[torch.nn.Module, dict[str, PartNames]] = WeakKeyDictionary()
"""Model -> own name -> checkpoint name of the tensor, or names of its parts. They follow from the architecture, so each
is found once."""


def checkpoint_tensors(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the model's tensors under the names and in the shapes of its checkpoint.

    weights: the tensors by the model's own names. A write to a view changes the model. Raises UserError if
    transformers names a form that no view can give.
    """
    parts = part_names(model, weights)
    return {part: view for name, tensor in weights.items() for part, view in part_views(parts[name], tensor)}


def part_names(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, PartNames]:
    """Return the checkpoint's names for each of the model's tensors: own name -> names. See `checkpoint_tensors`."""
    if model not in _parts:
        convert = _converts(model)
        _parts[model] = {name: _part_names(model, name, each) if convert else name for name, each in weights.items()}
    return _parts[model]


def _converts(model: torch.nn.Module) -> bool:
    if not hasattr(model, "config"):
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(model, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(model, add_legacy=False) if known is None else known)


def part_views(names: PartNames, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each part of a tensor: the tensor, or for all experts one chunk after another."""
    if isinstance(names, str):
        yield names, tensor
        return
    experts = len(tensor)
    for i, name in enumerate(names):
        yield name, tensor[i % experts].chunk(len(names) // experts)[i // experts]


def _part_names(model: torch.nn.Module, name: str, tensor: Tensor) -> PartNames:
    """The checkpoint's name of one tensor, or the names of its parts.

    transformers converts a tensor without memory, which gives them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty_like(tensor, device="meta")
    try:
        parts: dict[str, Any] = revert_weight_conversion(model, {name: empty})
    except Exception as error:
        raise _unsupported(name, f"{type(error).__name__}: {error}") from None
    names, shapes = tuple(parts), [tuple(part.shape) for part in parts.values()]
    if len(names) == 1 and shapes[0] == tuple(tensor.shape):
        return names[0]
    experts = len(tensor)
    if tensor.dim() != 3 or len(names) % experts or len(set(shapes)) != 1:
        raise _unsupported(name, f"it becomes {len(names)} tensors such as {names[0]} {list(shapes[0])}")
    chunks = len(names) // experts
    if tensor.shape[1] % chunks or shapes[0] != (tensor.shape[1] // chunks, tensor.shape[2]):
        raise _unsupported(name, f"one expert of shape {list(tensor.shape[1:])} becomes {list(shapes[0])}")
    _refuse_other_order(name, names, experts)
    return names


def _refuse_other_order(name: str, names: Sequence[str], experts: int) -> None:
    """Raise UserError unless the names list all experts of the first chunk, then all of the second."""
    numbers = [int(found[-1]) if (found := re.findall(r"\.(\d+)\.", one)) else -1 for one in names]
    if any(numbers[i : i + experts] != list(range(experts)) for i in range(0, len(numbers), experts)):
        raise _unsupported(name, f"its parts are named {', '.join(names[:3])}, ...")


def _unsupported(name: str, why: str) -> UserError:
    return UserError(
        f"model.path: the checkpoint's form of {name} cannot be derived from the model in memory ({why}); "
        f"this architecture cannot be trained yet"
    )
