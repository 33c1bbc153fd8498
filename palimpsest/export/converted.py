"""Export of models whose checkpoint names differ from the names in memory, for example one tensor for each expert.

transformers converts such names when it loads a checkpoint, and back when it saves one.
"""

from collections.abc import Iterable
from pathlib import Path

from palimpsest.common.snapshots.frames import RawTensor


def write_converted(starting: Path, tensors: Iterable[RawTensor], folder: Path, *, limit: int) -> None:
    """Write only the safetensors files. Loads the complete model into memory. Raises UserError."""
    import torch

    from palimpsest.services.learner.model.policy import load_model
    from palimpsest.services.learner.model.weights import load_weights

    model = load_model(str(starting), torch.device("cpu"), "eager")
    load_weights(model, tensors)
    model.save_pretrained(folder, max_shard_size=limit)  # type: ignore[operator]
    keep_weights(folder)


def keep_weights(folder: Path) -> None:
    """Delete what `save_pretrained` wrote besides weights: the export copies the configs of the starting model."""
    for file in folder.iterdir():
        if not file.name.startswith("model"):
            file.unlink()
