"""Sizes of the tensors that a version of a model consists of."""

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from palimpsest.services.learner.model.checkpoint_names import part_names, part_views


def published_tensors(model: torch.nn.Module) -> tuple[int, ...]:
    """Return the bytes of each tensor of a rehearsed model's checkpoint. Raises UserError if that has no known form."""
    with unset_fake_temporarily():
        empty = {
            name: torch.empty(each.shape, dtype=torch.bfloat16, device="meta")
            for name, each in model.named_parameters()
        }
        names = part_names(model, empty)
        parts = [part for name, each in empty.items() for _, part in part_views(names[name], each)]
    return tuple(part.numel() * part.element_size() for part in parts)
