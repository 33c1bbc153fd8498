"""Loads the tokenizer of a model."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def load_tokenizer(model: str, **options: Any) -> Any:
    """Load the tokenizer of a folder or hub id; equivalent to AutoTokenizer. Raises what transformers raises.

    options: of AutoTokenizer.from_pretrained.

    AutoTokenizer imports torch and the classes of every model, which takes four seconds of CPU time. A folder saved by
    transformers 5 names the generic class, which can be imported directly.
    """
    config = Path(model) / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text()).get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, **options)


def token_text(model: str) -> Callable[[int], str]:
    """Return a function that returns the text of a token, for displays. It loads the tokenizer at its first call.

    A part of a character is shown as a replacement character. Without a tokenizer on this machine, the text is the
    number of the token.
    """

    @cache
    def tokenizer() -> Any:
        try:
            return load_tokenizer(model, local_files_only=True)
        except (OSError, ValueError):
            return None

    def text(token: int) -> str:
        loaded = tokenizer()
        return f"[{token}]" if loaded is None else str(loaded.decode([token]))

    return text
