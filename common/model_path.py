"""Checks of model.path that need no model to be loaded."""

import difflib
import json
import os
from pathlib import Path

from palimpsest.common.user_error import UserError

WHOLE = "a complete model folder with config, weights and tokenizer is needed, as `save_pretrained` writes it"
MODELS = "models"
"""Folder of the models that the examples name."""
STARTING = f"{MODELS}/starting"
_OF_A_TOKENIZER = ("token", "vocab", "piece", "tekken")
"""Parts of tokenizer file names, over all model families."""


def refuse_absent(path: str) -> None:
    """Raise UserError if the path does not exist and is not the hub id of a model, such as Qwen/Qwen3-4B.

    A path in an existing folder, or in the folder of the examples, is no hub id.
    """
    folder = Path(path)
    if folder.exists():
        return
    here = folder.parent.is_dir() or str(folder.parent) == MODELS
    if path.count("/") == 1 and not here and not path.startswith((".", "/", "~")):
        return
    if path == STARTING:
        raise UserError(f"model.path: {path} does not exist; `make setup` builds the starting model of the examples")
    near = difflib.get_close_matches(path, [str(each) for each in folder.parent.glob("*/")], n=1)
    raise UserError(
        f"model.path: {path} does not exist{f'; did you mean {near[0]}?' if near else ''}: {WHOLE}. A plan needs its "
        f"config.json only"
    )


def refuse_no_model(path: str) -> None:
    """Raise UserError if the path does not exist (see `refuse_absent`) or holds no model that can be read."""
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
    # safetensors reports a file without permission as missing
    unreadable = [file for file in sorted(Path(path).glob("*.safetensors")) if not os.access(file, os.R_OK)]
    if unreadable:
        raise UserError(
            f"model.path: user {os.geteuid()} cannot read {unreadable[0]}: let every user read the files of the model "
            f"(chmod -R a+rX), and replace links that lead nowhere"
        )


def refuse_no_tokenizer(path: str) -> None:
    """Raise UserError if the path is a folder without a tokenizer. transformers would load an empty tokenizer."""
    folder = Path(path)
    if folder.is_dir() and not any(part in file.name for file in folder.iterdir() for part in _OF_A_TOKENIZER):
        raise UserError(f"model.path: {path} has no usable tokenizer (no tokenizer.json or its like): {WHOLE}")


def sentence(error: Exception) -> str:
    """Return the error text of a library in one line, at most 400 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:400]
