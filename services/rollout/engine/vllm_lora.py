"""Adapters (LoRA) in the vLLM engine: one adapter, which is replaced in place at each update.

All requests name the same adapter, so a request in flight continues with the next version after an update, as it does
with whole weights. The base weights stay as the engine loaded them from model.path.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.common import failpoints
from palimpsest.common.model_limits import mixture_of
from palimpsest.common.snapshots.adapter import CONFIG, PREFIX, WEIGHTS, Adapter, peft_config
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.engine.port import StoredWeights
from palimpsest.services.rollout.engine.vllm_weight_transfer import WRONG_WEIGHTS, stored_tensors

NAME, NUMBER = "policy", 1
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves memory for (`MaxLoRARanks`)."""


def engine_arguments(adapter: Adapter, model: str) -> dict[str, Any]:
    """Return the arguments of AsyncEngineArgs for an engine that serves this adapter. Raises UserError.

    model: model.path.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        refuse_mixture_of_cpu(model)
    rank = next((each for each in RANKS if each >= adapter.rank), None)
    if rank is None:
        raise UserError(f"learner.lora.rank is {adapter.rank}; vLLM serves at most {RANKS[-1]}")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": rank,
        # Else vLLM also wraps the output head, which fails on the CPU build when it scores several prompts in one step
        "lora_target_modules": sorted({target.rpartition(".")[2] for target in adapter.targets}),
        "worker_extension_cls": f"{__name__}.{LoadsAdapter.__name__}",
    }


def refuse_mixture_of_cpu(model: str) -> None:
    """Raise UserError if the model is a mixture of experts, which vLLM's CPU build does not compute with adapters."""
    if found := mixture_of(model):
        raise UserError(
            f"learner.lora.rank is set, and the model in {model} is a mixture of experts ({found} in config.json). "
            f"With adapters, also on the attention alone, vLLM computes the experts with Triton, which its CPU build "
            f"lacks: use a GPU, or set learner.lora.rank = 0"
        )


def request_for(folder: Path, *, replace: bool = False) -> Any:
    """Return the LoRARequest of the adapter. folder: see write_folder; replace: load its files again."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, NUMBER, str(folder), load_inplace=replace)


def write_folder(weights: StoredWeights, adapter: Adapter, folder: Path) -> None:
    """Write a version's adapter as peft would, for vLLM to read. Raises OSError."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter)))
    entries = [{"name": e.name, "dtype": e.dtype, "shape": e.shape, "size": e.size} for e in weights.manifest.tensors]
    save_file(dict(stored_tensors(str(weights.path), entries)), folder / WEIGHTS)


class LoadsAdapter:
    """Methods that vLLM's worker gets besides its own (`worker_extension_cls`)."""

    def load_adapter(self, folder: str) -> None:
        """Replace the adapter by the one in a folder, and compare what computes with the files.

        Raises RuntimeError, marked with WRONG_WEIGHTS if they differ.
        """
        from safetensors.torch import load_file

        worker: Any = self
        if not failpoints.active("rollout.skip_adapter"):
            worker.add_lora(request_for(Path(folder), replace=True))
        if failpoints.active("rollout.skip_read_back"):
            return
        config = json.loads((Path(folder) / CONFIG).read_text())
        published = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(Path(folder) / WEIGHTS).items()}
        manager = worker.model_runner.lora_manager._adapter_manager
        different = _difference(manager, published, scale=config["lora_alpha"] / config["r"])
        if different:
            raise RuntimeError(f"{WRONG_WEIGHTS}{different}")


def _difference(manager: Any, published: Mapping[str, Any], *, scale: float) -> str:
    """Return what computes with another adapter than the published one; empty if nothing does.

    manager: vLLM's LoRAModelManager. It keeps B multiplied by the scale, and fuses layers, for example q, k and v.
    """
    if NUMBER not in manager.lora_index_to_id:
        return "the engine has no adapter"
    slot, seen = manager.lora_index_to_id.index(NUMBER), set[str]()
    for fused, module in manager.modules.items():
        parts = manager.packed_modules.get(fused, [fused])
        if len(parts) != len(module.lora_a_stacked):
            return f"{fused} has {len(module.lora_a_stacked)} adapters, not {len(parts)}"
        for part, held_a, held_b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
            names = f"{part}.lora_A.weight", f"{part}.lora_B.weight"
            a, b = (published.get(name) for name in names)
            own_a, own_b = held_a[slot, 0], held_b[slot, 0]
            if a is not None and b is not None:
                seen.update(names)
                same_a, own_a = bool((own_a[: len(a)] == a.to(own_a.device)).all()), own_a[len(a) :]
                same_b, own_b = bool((own_b[:, : len(a)] == (b * scale).to(own_b.device)).all()), own_b[:, len(a) :]
                if not same_a or not same_b:
                    return f"{part} computes with another adapter than the published one"
            if bool(own_a.any()) or bool(own_b.any()):
                return f"{part} computes with numbers beyond the published adapter"
    if left := sorted(published.keys() - seen):
        return f"the engine does not serve {left[0]} and {len(left) - 1} more tensors of the adapter"
    return ""
