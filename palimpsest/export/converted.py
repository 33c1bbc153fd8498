"""Tensors under the names of a checkpoint that differ from the model's own, for example one tensor for each expert.

transformers translates such checkpoints when it loads them, and back when it saves; this has it save.
"""

from collections.abc import Iterable
from pathlib import Path

from palimpsest.common.snapshots.frames import RawTensor


def write_converted(starting: Path, tensors: Iterable[RawTensor], folder: Path, *, limit: int) -> None:
    """Write the safetensors files and nothing else. Memory holds the whole model. Raises UserError."""
    import torch

    from palimpsest.services.learner.model.policy import load_model
    from palimpsest.services.learner.model.weights import load_weights

    model = load_model(str(starting), torch.device("cpu"), "eager")
    load_weights(model, tensors)
    model.save_pretrained(folder, max_shard_size=limit)  # type: ignore[operator]
    for file in folder.iterdir():
        if not file.name.startswith("model"):
            file.unlink()  # configs, which are taken from the starting model
