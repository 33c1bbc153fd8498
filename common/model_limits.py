"""Limits of a model: its tokenizer must fit its embedding, and the trajectories must fit its positions.

`refuse_limits` reads the JSON files of a model folder and imports no library, so `palimpsest check` uses it too.
`refuse_tokenizer` loads the tokenizer, which may add tokens while it loads; services call it at their start.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.common.config.schema import RunConfig, VllmEngineConfig
from palimpsest.common.tokenizer import load_tokenizer
from palimpsest.common.user_error import UserError

POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of config.json that hold a number of positions. The smallest value counts, as in vLLM."""
UNSCALED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Types of RoPE scaling that leave the number of positions unchanged, as in vLLM. Other types multiply it by factor."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerSize:
    """The token ids of a tokenizer, added tokens included."""

    tokens: int
    """Number of tokens."""
    largest: int
    """Largest token id."""


def refuse_limits(config: RunConfig) -> None:
    """Raise UserError unless tokenizer and trajectories fit the model. Checks only what its JSON files state."""
    path = config.model.path
    values = _read(Path(path) / "config.json")
    rows, size = text_values(values).get("vocab_size"), tokenizer_size(Path(path))
    if isinstance(rows, int) and size is not None:
        _refuse_rows(path, size, rows)
    limit = positions(values)
    # vLLM counts the token that it samples after a prompt, also when it only scores the prompt.
    more = 1 if isinstance(config.rollout.engine, VllmEngineConfig) else 0
    longest = config.sampling.max_trajectory_tokens
    if limit is not None and longest + more > limit[0]:
        raise UserError(
            f"sampling.max_trajectory_tokens is {longest}, but the model in {path} has {limit[0]} positions "
            f"({limit[1]} in config.json)"
            + (", and the engine needs one token more" if more else "")
            + f". Set sampling.max_trajectory_tokens to at most {limit[0] - more}, or choose a model.path with more "
            f"positions"
        )


def refuse_tokenizer(path: str) -> None:
    """Raise UserError if the tokenizer has an id without a row in the embedding. path: folder or hub id.

    A tokenizer or config that cannot be loaded is ignored: the code that uses it refuses it.
    """
    try:
        rows = text_values(_read(Path(path) / "config.json")).get("vocab_size")
        if not isinstance(rows, int):  # a hub id, or the default of the architecture
            from transformers import AutoConfig

            rows = AutoConfig.from_pretrained(path).get_text_config().vocab_size
        tokenizer = load_tokenizer(path)
        size = TokenizerSize(len(tokenizer), max(tokenizer.get_vocab().values()))
    except Exception:
        return
    _refuse_rows(path, size, rows)


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of config.json that describe the language model.

    >>> text_values({"model_type": "gemma3", "text_config": {"vocab_size": 8}})
    {'vocab_size': 8}
    """
    nested = values.get("text_config")
    return nested if isinstance(nested, dict) else values


def positions(values: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the number of positions from which vLLM derives its limit, and its key. None: config.json states none.

    >>> positions({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    (8192, 'max_position_embeddings times the factor of rope_scaling')
    """
    text = text_values(values)
    found = {key: text[key] for key in POSITION_KEYS if isinstance(text.get(key), int)}
    if isinstance(text.get("model_max_length"), int):
        found = {"model_max_length": text["model_max_length"]}
    if not found:
        return None
    key = min(found, key=found.__getitem__)
    if "gemma3" not in str(values.get("model_type")):
        for name in ("rope_parameters", "rope_scaling"):
            for rope in _ropes(text.get(name)):
                factor = rope.get("factor")
                if rope.get("rope_type", rope.get("type", "default")) not in UNSCALED and isinstance(
                    factor, int | float
                ):
                    return int(found[key] * factor), f"{key} times the factor of {name}"
    return found[key], key


def tokenizer_size(folder: Path) -> TokenizerSize | None:
    """Return the size of the folder's tokenizer, with the special tokens that transformers adds when it loads.

    None: the folder has no tokenizer.json that can be read.
    """
    values, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    ids: dict[str, int] = {}
    try:
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids.update(vocabulary)
        else:  # Unigram: [text, score], the index is the id
            ids.update({text: i for i, (text, _) in enumerate(vocabulary)})
        ids.update({token["content"]: token["id"] for token in values.get("added_tokens", ())})
        ids.update({_text(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()})
        for token in _special_tokens(settings):
            ids.setdefault(token, max(ids.values()) + 1)
        return TokenizerSize(len(ids), max(ids.values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _refuse_rows(path: str, size: TokenizerSize, rows: int) -> None:
    """Raise UserError if a token has no row. More rows than tokens are padding."""
    if size.largest >= rows:
        raise UserError(
            f"model.path: the tokenizer of {path} has {size.tokens} tokens with ids up to {size.largest}, but the "
            f"model's embedding has {rows} rows (vocab_size in config.json). Resize the embedding "
            f"(`model.resize_token_embeddings(len(tokenizer))`) and save the model, or remove the added tokens from "
            f"the tokenizer"
        )


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    named = [settings.get(key) for key in _SPECIAL]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    for token in (*named, *(extra.values() if isinstance(extra, dict) else extra)):
        if text := _text(token):
            yield text


def _text(token: Any) -> str:
    """Return the text of a token, which is a string or a table with its options."""
    return str(token["content"]) if isinstance(token, dict) else str(token or "")


def _ropes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE parameters: one table, or one for each type of layer."""
    if isinstance(value, dict):
        nested = [each for each in value.values() if isinstance(each, dict)]
        yield from nested or [value]


def _read(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; empty if there is none: other code refuses such a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
