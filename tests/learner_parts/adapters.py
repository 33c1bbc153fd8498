"""Models with a low-rank adapter, and the same by peft alone."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.services.learner.model.lora import adapter_weights, add_adapter
from palimpsest.services.learner.model.policy import load_model
from tests.learner_parts.models import CPU, load

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
ADAPTER = Adapter("base", 4, 8.0, ("down_proj", "q_proj", "v_proj"))
ATTENTION_LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "o_proj"))
ATTENTION_ADAPTER = Adapter("base", 4, 8.0, ("o_proj", "q_proj"))
"""Of a mixture of experts."""


def adapted(folder: Path, *, seed: int = 0, packed: bool = False, lora: LoraConfig = LORA) -> torch.nn.Module:
    """The model with an adapter that changes what it computes. packed: its passes have no padding."""
    torch.manual_seed(seed)
    model = load_model(str(folder), CPU, "sdpa", layout="packed") if packed else load(folder)
    add_adapter(model, lora)
    renew(model, seed=seed)
    return model


@torch.no_grad()
def renew(model: torch.nn.Module, *, seed: int) -> None:
    """Replace the adapter by a random one of this seed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in own_adapter(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def own_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by the names of peft's files."""
    found = adapter_weights(model)
    assert found is not None
    return found


def by_peft(folder: Path, tensors: dict[str, torch.Tensor], files: Path) -> Any:
    """Load the base model and then these tensors with peft's own reader of adapters. files: an empty folder."""
    files.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA.rank, "lora_alpha": LORA.alpha,
        "target_modules": list(LORA.targets),
    }  # fmt: skip
    (files / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, files / "adapter_model.safetensors")
    return PeftModel.from_pretrained(load(folder), files, autocast_adapter_dtype=False).eval()
