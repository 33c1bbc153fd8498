"""Export of versions that hold a low-rank adapter: alone, as peft loads it, or merged into its base model."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from palimpsest.common.base_model import base_digest
from palimpsest.common.files import write
from palimpsest.common.snapshots.adapter import BASE_DIGEST, CONFIG, PREFIX, WEIGHTS, Adapter, peft_config
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.user_error import UserError
from palimpsest.export.converted import keep_weights
from palimpsest.export.safetensors_file import SafetensorsFile
from palimpsest.export.starting_model import StartingModel


def write_adapter(
    tensors: Iterator[RawTensor], manifest: Manifest, adapter: Adapter, starting: StartingModel, folder: Path
) -> None:
    """Write the adapter's tensors, as stored, and its config, which names the base by hub id or folder; the metadata
    of the tensors has the base's digest."""
    base = starting.hub_id or str(starting.folder.resolve())
    write(folder / CONFIG, (json.dumps(peft_config(adapter, base), indent=2) + "\n").encode())
    with (folder / WEIGHTS).open("wb") as opened:
        file = SafetensorsFile(opened, manifest.tensors, {BASE_DIGEST: adapter.base})
        for tensor in tensors:
            file.write(tensor)
        file.sync()


def write_merged(
    tensors: Iterable[RawTensor], adapter: Adapter, starting: StartingModel, folder: Path, *, limit: int
) -> None:
    """Write only the safetensors files of the base model with the adapter added to its weights.

    A merged weight is W + (alpha / rank) B A, computed in float32 and rounded once to bf16. Loads the whole model into
    memory. Raises UserError if the starting model is not the adapter's base.
    """
    import torch

    from palimpsest.services.learner.model.policy import load_model
    from palimpsest.services.learner.model.weights import as_tensor

    if base_digest(str(starting.folder)) != adapter.base:
        raise UserError(
            f"{starting.folder} is not the base model of this version (digest {adapter.base[:16]}): name the folder "
            f"that the run began with, RUN.toml --model.path=FOLDER, or export the adapter alone with --adapter"
        )
    model = load_model(str(starting.folder), torch.device("cpu"), "eager")
    matrices = {tensor.name.removeprefix(PREFIX): as_tensor(tensor).float() for tensor in tensors}
    with torch.no_grad():
        for name in [name for name in matrices if name.endswith(".lora_A.weight")]:
            layer = name.removesuffix(".lora_A.weight")
            change = matrices[f"{layer}.lora_B.weight"] @ matrices[name] * (adapter.alpha / adapter.rank)
            weight = model.get_parameter(f"{layer}.weight")
            weight.copy_(weight.float() + change)
    model.save_pretrained(folder, max_shard_size=limit)  # type: ignore[operator]
    keep_weights(folder)
