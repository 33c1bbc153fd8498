"""The digest of a base model: of the model folder that a run with adapters computes with (learner.lora)."""

from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.model_path import WHOLE, refuse_no_model, sentence
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.user_error import ExitCode, UserError

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.bin")
"""Files of weights, by preference: transformers and vLLM read the second kind only without the first."""


def own_adapter(config: RunConfig) -> Adapter | None:
    """Return what this run's versions are; None if they hold whole weights. Reads all weights of model.path once.

    Raises UserError if the model cannot be read.
    """
    lora = config.learner.lora
    if not lora.rank:
        return None
    return Adapter(base_digest(config.model.path), lora.rank, lora.alpha, tuple(sorted(set(lora.targets))))


def base_digest(path: str) -> str:
    """Return blake3, hex, over the names and contents of config.json and the weight files of a folder or hub id.

    Copies of a folder have the same digest. A model that is saved again in other files has another one, also with equal
    weights. Raises UserError.
    """
    refuse_no_model(path)
    hasher = blake3()
    for file in _files(Path(path) if Path(path).exists() else _of_the_hub(path)):
        own = blake3(max_threads=blake3.AUTO)
        try:
            own.update_mmap(file)
        except OSError as error:
            raise UserError(f"model.path: {file} cannot be read ({error}): {WHOLE}") from None
        hasher.update(file.name.encode() + b"\0" + own.digest())
    return hasher.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    yield folder / CONFIG
    for pattern in WEIGHTS:
        if found := sorted(file for file in folder.glob(pattern) if not file.name.startswith(("adapter_", "."))):
            yield from found
            return


def _of_the_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"model.path: the files of {hub_id} cannot be fetched ({sentence(error)}): name a copy on this machine",
            ExitCode.UNAVAILABLE,
        ) from None
