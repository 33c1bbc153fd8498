"""Files of an exported model, and the contents of its JSON files. Pure."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from palimpsest.common.snapshots.manifest import TensorEntry

CONFIG, CARD = "config.json", "README.md"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Maximum bytes of tensors in one file. A larger tensor gets its own file."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_COPIED = re.compile(
    r"generation_config\.json|chat_template\.\w+|merges\.txt|.*(token|vocab|piece|tekken).*|(LICENSE|NOTICE)\b.*"
)
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of named chat templates."""
TOKENIZER, KEY = "tokenizer_config.json", "chat_template"
"""File that can hold the chat templates, and its key for them."""
DTYPE_KEYS = ("dtype", "torch_dtype")


def is_copied(name: str) -> bool:
    """Return whether the export copies this file of the starting model unchanged.

    >>> [name for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE") if not is_copied(name)]
    []
    >>> [name for name in ("README.md", "config.json", "tokens.bin", "optimizer.pt", ".token") if is_copied(name)]
    []
    """
    return bool(_COPIED.fullmatch(name)) and not name.startswith(".") and not name.lower().endswith(WEIGHTS)


def is_template(name: str) -> bool:
    """Return whether the file holds nothing but chat templates.

    >>> [name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json") if is_template(name)]
    ['chat_template.jinja', 'chat_template.json']
    """
    return name.startswith("chat_template.") or name.endswith(".jinja")


def without_template(text: str) -> str:
    """Return tokenizer_config.json without its chat template. The text is unchanged if it has none.

    >>> print(without_template('{"chat_template": "x", "eos_token": "</s>"}'), end="")
    {
      "eos_token": "</s>"
    }
    """
    config = json.loads(text)
    return _json({key: value for key, value in config.items() if key != KEY}) if KEY in config else text


def shards(tensors: Iterable[TensorEntry], limit: int) -> dict[str, list[TensorEntry]]:
    """Return the tensors of each file, in object order. A file holds at most `limit` bytes, or one tensor."""
    entries = {entry.name: entry for entry in sorted(tensors, key=lambda entry: entry.start)}
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    return {file: [entries[name] for name in names] for file, names in split.filename_to_tensors.items()}


def index(files: Mapping[str, Sequence[TensorEntry]]) -> str:
    """Return the text of the index, which maps each tensor to its file."""
    size = sum(entry.size for entries in files.values() for entry in entries)
    places = {entry.name: file for file, entries in files.items() for entry in entries}
    return _json({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def main_dtype(tensors: Iterable[TensorEntry]) -> str:
    """Return the dtype with the most bytes, by its torch name. The model is loaded in this dtype."""
    sizes: Counter[str] = Counter()
    for entry in tensors:
        sizes[entry.dtype] += entry.size
    return sizes.most_common(1)[0][0]


def config_text(text: str, dtype: str) -> str:
    """Return config.json with the dtype of the exported tensors. The text is unchanged if the dtype already matches.

    >>> print(config_text('{"dtype": "float32", "vocab_size": 8}', "bfloat16"), end="")
    {
      "dtype": "bfloat16",
      "vocab_size": 8
    }
    """
    config = json.loads(text)
    changed = _with_dtype(config, dtype)
    if not any(key in changed for key in DTYPE_KEYS):
        changed["dtype"] = dtype
    return text if changed == config else _json(changed)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config with another dtype. Nested configs (`*_config`) change too."""
    return {
        key: dtype if key in DTYPE_KEYS else _with_dtype(value, dtype) if key.endswith("_config") and value else value
        for key, value in config.items()
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
