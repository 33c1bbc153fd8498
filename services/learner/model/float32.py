"""A forward pass in float32 with a model that is kept in bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.services.learner.model.lora import is_adapted_layer


@contextmanager
def float32_forward(model: nn.Module) -> Iterator[None]:
    """Compute forward passes inside in float32, module by module.

    Each module's own bfloat16 or float16 parameters are converted just before its forward pass and restored just
    after it, so the extra memory is one module's parameters at a time. Values are those of a float32 copy of the
    model. For inference only: call it under `torch.no_grad()`, and change no parameter inside.

    A layer with an adapter is converted as one module, because it reads the type of its parts before they compute.
    """
    stored: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
    hooks = []

    def convert(module: nn.Module, _arguments: Any) -> None:
        own = module.parameters() if is_adapted_layer(module) else module._parameters.values()
        low = [p for p in own if p is not None and p.dtype in (torch.bfloat16, torch.float16)]
        stored[id(module)] = [(p, p.data) for p in low]
        for parameter in low:
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _arguments: Any, _output: Any) -> None:
        for parameter, data in stored.pop(id(module), ()):
            parameter.data = data

    for module in model.modules():
        if module._parameters or is_adapted_layer(module):
            hooks += [
                module.register_forward_pre_hook(convert),
                module.register_forward_hook(restore, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for left in stored.values():
            for parameter, data in left:
                parameter.data = data
