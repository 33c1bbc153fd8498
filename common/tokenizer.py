"""Loads the tokenizer of a model."""

import json
from pathlib import Path
from typing import Any


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a folder or hub id; equivalent to AutoTokenizer. Raises what transformers raises.

    AutoTokenizer imports torch and the classes of every model, which takes four seconds of CPU time. A folder saved by
    transformers 5 names the generic class, which can be imported directly.
    """
    config = Path(model) / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text()).get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
