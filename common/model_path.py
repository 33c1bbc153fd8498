"""Mistakes in model.path that can be told without loading anything."""

import json
from pathlib import Path

from palimpsest.common.user_error import UserError

WHOLE = "it takes a whole model folder, with config, weights and tokenizer, as `save_pretrained` writes it"
_OF_A_TOKENIZER = ("token", "vocab", "piece", "tekken")
"""Parts of the file names under which the families keep their tokenizers."""


def refuse_absent(path: str) -> None:
    """Raises UserError when the path is neither there nor the hub id of a model."""
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"model.path: {path} does not exist; `make setup` builds the starting model of the examples")


def refuse_no_model(path: str) -> None:
    """Raises UserError when the path is there and holds no model, too."""
    refuse_absent(path)
    if not Path(path).exists():
        return
    config = Path(path) / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"model.path: {path} holds no model (there is no {config}): {WHOLE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {config} cannot be read ({error}): {WHOLE}") from None


def refuse_no_tokenizer(path: str) -> None:
    """Raises UserError when the path is a folder without a tokenizer: transformers makes an empty one of it."""
    folder = Path(path)
    if folder.is_dir() and not any(part in file.name for file in folder.iterdir() for part in _OF_A_TOKENIZER):
        raise UserError(f"model.path: {path} has no usable tokenizer (no tokenizer.json or its like): {WHOLE}")


def sentence(error: Exception) -> str:
    """What a library says of a model, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:400]
