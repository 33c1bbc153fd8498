"""The checkpoint's names for the tensors of a model in memory.

transformers keeps some architectures in another form than their checkpoints: it fuses the experts of a layer into one
tensor. A version in the store is a checkpoint, so it uses the checkpoint's names.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from palimpsest.common.user_error import UserError


def checkpoint_tensors(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the model's tensors under the names and in the shapes of its checkpoint.

    weights: the tensors by the model's own names. A write to a view changes the model. Raises UserError if
    transformers names a form that no view can give.
    """
    if not _converts(model):
        return dict(weights)
    return {part: view for name, tensor in weights.items() for part, view in _views(model, name, tensor)}


def _converts(model: torch.nn.Module) -> bool:
    if not hasattr(model, "config"):
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(model, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(model, add_legacy=False) if known is None else known)


def _views(model: torch.nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the views of one tensor. transformers converts a tensor without memory, which gives names and shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty_like(tensor, device="meta")
    try:
        parts: dict[str, Any] = revert_weight_conversion(model, {name: empty})
    except Exception as error:
        raise _unsupported(name, f"{type(error).__name__}: {error}") from None
    names, shapes = list(parts), [tuple(part.shape) for part in parts.values()]
    if len(names) == 1 and shapes[0] == tuple(tensor.shape):
        yield names[0], tensor
        return
    experts = tensor.shape[0]
    if tensor.dim() != 3 or len(names) % experts or len(set(shapes)) != 1:
        raise _unsupported(name, f"it becomes {len(names)} tensors such as {names[0]} {list(shapes[0])}")
    chunks = len(names) // experts
    if tensor.shape[1] % chunks or shapes[0] != (tensor.shape[1] // chunks, tensor.shape[2]):
        raise _unsupported(name, f"one expert of shape {list(tensor.shape[1:])} becomes {list(shapes[0])}")
    for i, expert in enumerate(_expert_numbers(name, names, experts)):
        yield names[i], tensor[expert].chunk(chunks)[i // experts]


def _expert_numbers(name: str, names: Sequence[str], experts: int) -> list[int]:
    """The expert of each name. transformers lists all experts of the first chunk, then all of the second."""
    numbers = [int(found[-1]) if (found := re.findall(r"\.(\d+)\.", one)) else -1 for one in names]
    if any(numbers[i : i + experts] != list(range(experts)) for i in range(0, len(numbers), experts)):
        raise _unsupported(name, f"its parts are named {', '.join(names[:3])}, ...")
    return numbers


def _unsupported(name: str, why: str) -> UserError:
    return UserError(
        f"model.path: the checkpoint's form of {name} cannot be derived from the model in memory ({why}); "
        f"this architecture cannot be trained yet"
    )
