"""Low-rank adapters (LoRA) by peft: the model's weights are frozen, and each target layer gets two small matrices.

The layers are those of peft, and so is what they compute: W x + (B (A x)) alpha / rank, each product in bf16. Only A
and B are trained, published and stored. The model stays an object of its own class, so that everything else treats it
like one without adapters.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor

from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.model_path import sentence
from palimpsest.common.snapshots.adapter import PREFIX
from palimpsest.common.user_error import UserError

ATTRIBUTE = "palimpsest_adapter"
"""Attribute of a model with an adapter. Copies of the model have it too."""
_OWN_NAME = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
EXTRA = "learner.lora needs the package peft: pip install palimpsest[lora]"


def add_adapter(model: torch.nn.Module, config: LoraConfig) -> None:
    """Freeze the model's weights and add an adapter that changes nothing yet: A is random, B is 0.

    A follows torch's random state. Raises UserError if peft is missing or the targets do not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise UserError(EXTRA) from None
    causal: Any = model
    wanted = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), lora_dropout=0.0, bias="none"
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"learner.lora.targets: {type(model).__name__} has no linear layer {target}; it has {known}"
            )
    try:
        peft.inject_adapter_in_model(wanted, model)
    except Exception as error:  # peft raises ValueError and others for layers that it does not support
        raise UserError(f"learner.lora: peft cannot adapt {type(model).__name__} ({sentence(error)})") from None
    if any(hasattr(layer, "lora_A") for layer in (causal.get_input_embeddings(), causal.get_output_embeddings())):
        raise UserError(
            "learner.lora.targets: the embedding and the output head cannot have an adapter; leave them out"
        )
    model.eval()
    setattr(model, ATTRIBUTE, True)


def adapter_weights(model: torch.nn.Module) -> dict[str, Tensor] | None:
    """Return views of the adapter's tensors under the names of peft's files; None if the model has no adapter.

    Of an adapter with rank r: `NAME.lora_A.weight` is [r, inputs], `NAME.lora_B.weight` is [outputs, r].
    """
    inner = getattr(model, "causal", model)  # of a sharded model
    if not getattr(inner, ATTRIBUTE, False):
        return None
    matches = ((_OWN_NAME.fullmatch(name), tensor) for name, tensor in inner.named_parameters())
    return {f"{PREFIX}{own[1]}.lora_{own[2]}.weight": tensor.detach() for own, tensor in matches if own}


def copy_trained(model: torch.nn.Module, part: torch.nn.Module | None = None) -> torch.nn.Module:
    """Return a copy of the model, or of a part of it, for other weights. If the model has an adapter, both share the
    frozen weights."""
    if not getattr(model, ATTRIBUTE, False):
        return copy.deepcopy(part or model)
    shared = {id(tensor): tensor for name, tensor in model.named_parameters() if not _OWN_NAME.fullmatch(name)}
    return copy.deepcopy(part or model, shared)


@torch.no_grad()
def copy_adapter(model: torch.nn.Module, of: torch.nn.Module) -> None:
    """Overwrite the adapter of the model, or of its decoder, by that of a model with the same layers. Does nothing
    without adapters."""
    own, other = (
        [tensor for name, tensor in each.named_parameters() if _OWN_NAME.fullmatch(name)] for each in (model, of)
    )
    for target, tensor in zip(own, other, strict=True):
        target.copy_(tensor)


def is_adapted_layer(module: torch.nn.Module) -> bool:
    """Whether the module is a layer of peft: a frozen layer with an adapter."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
