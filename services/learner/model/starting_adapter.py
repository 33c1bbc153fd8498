"""The adapter with which a run begins (learner.lora.start): reads a folder of peft into the model, without rounding.

An adapter that the run would compute in another way than peft does is refused: another form, another base model, or a
variant of LoRA that learner.lora does not have.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from palimpsest.common.base_model import base_digest
from palimpsest.common.model_path import sentence
from palimpsest.common.snapshots.adapter import BASE_DIGEST, CONFIG, WEIGHTS, Adapter
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.lora import adapter_weights

_KEY = "learner.lora.start"
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
"""Keys of adapter_config.json that change no value of the adapter's passes, or that are compared by themselves."""
_NEW_WEIGHTS = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_LISTED = 3
"""Number of tensors that an error names."""


@torch.no_grad()
def load_starting_adapter(model: torch.nn.Module, folder: Path, own: Adapter, base: str) -> None:
    """Overwrite the adapter of the model by the one in the folder. own: of the run; base: model.path.

    Raises UserError if a file is missing or damaged, or if the adapter is of another form or base model.
    """
    values = _config(folder)
    _refuse_variant(values, folder)
    _refuse_form(values, own, folder)
    tensors, digest = _tensors(folder)
    _refuse_base(values, digest, own, folder, base)
    weights = adapter_weights(model)
    assert weights is not None
    _refuse_tensors(tensors, weights, folder)
    for name, tensor in tensors.items():
        weights[name].copy_(tensor)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _error(
            f"{folder} holds no adapter (there is no {file}); `palimpsest export --adapter` writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise _error(f"{file} cannot be read ({sentence(error)}): restore it from a copy") from None
    if not isinstance(values, dict):
        raise _error(f"{file} holds no JSON object: restore it from a copy")
    return values


def _refuse_variant(values: dict[str, Any], folder: Path) -> None:
    """Raise UserError if a setting that learner.lora does not have differs from peft's default."""
    import peft

    default = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list)) | {"peft_type": "LORA"}
    different = [
        f"{key} = {json.dumps(value)}"
        for key, value in sorted(values.items())
        if key not in _FREE and key != "init_lora_weights" and value != default.get(key) and (value or default.get(key))
    ]
    if (drawn := values.get("init_lora_weights", True)) not in _NEW_WEIGHTS:
        different.append(f"init_lora_weights = {json.dumps(drawn)}")
    if different:
        raise _error(
            f"{folder / CONFIG} describes an adapter that learner.lora does not compute ({', '.join(different)}): name "
            f"a plain LoRA adapter"
        )


def _refuse_form(values: dict[str, Any], own: Adapter, folder: Path) -> None:
    """Raise UserError if rank, alpha or targets are not those of the run."""
    targets = values.get("target_modules")
    found = {
        "rank": values.get("r"),
        "alpha": values.get("lora_alpha"),
        "targets": sorted(set(map(str, targets))) if isinstance(targets, list) else targets,
    }
    expected = {"rank": own.rank, "alpha": own.alpha, "targets": list(own.targets)}
    if different := [
        f"learner.lora.{key} is {json.dumps(expected[key])}, the adapter has {json.dumps(found[key])}"
        for key in expected
        if found[key] != expected[key]
    ]:
        raise _error(
            f"the adapter in {folder} has another form ({'; '.join(different)}): set learner.lora to the values of the "
            f"adapter"
        )


def _tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the digest of the base model; None if the file does not name it."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise _error(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, (opened.metadata() or {}).get(BASE_DIGEST)
    except (OSError, SafetensorError) as error:
        raise _error(f"{file} is damaged or cannot be read ({sentence(error)}): restore it from a copy") from None


def _refuse_base(values: dict[str, Any], digest: str | None, own: Adapter, folder: Path, base: str) -> None:
    """Raise UserError if the adapter is of another base model: by its digest, else by the name that the config has."""
    named = values.get("base_model_name_or_path")
    if digest is None and isinstance(named, str) and named != base and Path(named).is_dir():
        with suppress(UserError):  # the folder may hold another thing by now
            digest = base_digest(named)
    if digest is not None and digest != own.base:
        raise _error(
            f"the adapter in {folder} belongs to another base model ({named}, digest {digest[:16]}) than model.path "
            f"({base}, digest {own.base[:16]}): set model.path to the base of the adapter"
        )
    if digest is None and named != base:
        raise _error(
            f"the adapter in {folder} names {json.dumps(named)} as its base model, and model.path is {base}: set "
            f"model.path to this model or, if it is a copy of it, base_model_name_or_path in {CONFIG} to {base}"
        )


def _refuse_tensors(tensors: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError unless the tensors are those of the model's adapter by name, shape and type, and finite."""
    file = folder / WEIGHTS
    for kind, names in (("lacks", weights.keys() - tensors.keys()), ("has unknown", tensors.keys() - weights.keys())):
        if names:
            listed = ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            raise _error(f"{file} {kind} tensors ({len(names)}: {listed}): name a complete adapter of model.path")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != weights[name].shape:
            raise _error(
                f"{name} in {file} has shape {list(tensor.shape)}; model.path needs {list(weights[name].shape)}: name "
                f"an adapter of this model"
            )
        if tensor.dtype != weights[name].dtype:
            raise _error(
                f"{name} in {file} is {_type(tensor)}; a run computes with {_type(weights[name])}, and a conversion "
                f"would change values: convert the adapter, and check what it computes then"
            )
        if not tensor.isfinite().all():
            raise _error(f"{name} in {file} has values that are not finite: restore the file from a copy")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _error(text: str) -> UserError:
    return UserError(f"{_KEY}: {text}")
