"""Finds the tokens that end a model message.

Many models end a message with another token than the tokenizer's eos token, and some have several such tokens:

- Gemma `<end_of_turn>`, Phi-3 `<|end|>`: the chat template writes the token after a model message
- Llama 3 `<|eot_id|>` and `<|eom_id|>`, gpt-oss `<|return|>` and `<|call|>`: generation_config.json lists them
- GLM-4: a message ends where the next role begins, with `<|user|>` or `<|observation|>`
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SENTINEL = "\u241epalimpsest\u241e"
ANSWER = "\u241eanswer\u241e"
Dialogue = list[dict[str, str]]
_MARKUP = re.compile(r"<\|[^<>|\s]+\|>")


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """The tokens that end a model message."""

    tokens: tuple[int, ...]
    """Stop tokens. The first one is the token that the template itself writes, if it writes one."""
    closing: frozenset[int]
    """Tokens with which the template closes a model message. Every other stop token stands in for them.

    A stop token that opens the next message, such as GLM-4's `<|user|>`, is not among them."""


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens, and of added tokens of the form `<|name|>`."""
    added = tokenizer.added_tokens_decoder.items()
    marked = (token for token, entry in added if entry.special or _MARKUP.fullmatch(entry.content))
    return frozenset((*tokenizer.all_special_ids, *marked))


def find_turn_ends(
    tokenizer: Any, render: Callable[[Dialogue, bool], str], generation_ids: Sequence[int] = ()
) -> TurnEnds:
    """Return the tokens that end a model message.

    `render` renders a dialogue, with a generation prompt if its second argument is true. A template that refuses a
    probe dialogue contributes no token. `generation_ids` are the ids of generation_config.json.
    """
    control = control_tokens(tokenizer)

    def following(*roles: str) -> list[int]:
        """Return the control tokens between a model message and the next content, or the end of the text."""
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
        dialogue += [{"role": role, "content": ANSWER} for role in roles]
        with suppress(Exception):  # what the template cannot render is reported when the renderer is checked
            _, found, text = render(dialogue, bool(roles)).rpartition(SENTINEL)
            if found:
                text = text.partition(ANSWER)[0].lstrip()
                tokens = list(tokenizer.encode(text, add_special_tokens=False))
                return [token for token in tokens if token in control] if tokens[:1] and tokens[0] in control else []
        return []

    last = following()[:1]
    answers = [found for role in ("user", "tool") if (found := following(role))]
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    # A single control token before the next content opens the next message: GLM-4 writes `<|observation|>` there.
    closing = [*last, *(found[0] for found in answers if len(found) > 1 or found[0] in (*last, *eos))]
    opening = [] if closing else [found[0] for found in answers]
    # gpt-oss closes its last message with `<|return|>` and earlier ones with `<|end|>`, which also ends its reasoning:
    # only the token of the last message is a stop token.
    stops = [*(last or closing), *opening, *eos, *(token for token in generation_ids if 0 <= token < len(tokenizer))]
    return TurnEnds(tuple(dict.fromkeys(stops)), frozenset(closing))


def generation_ids(model: str) -> tuple[int, ...]:
    """Return `eos_token_id` of the model's generation_config.json: one id, several, or none if there is no such file.

    Raises ValueError if the file is not JSON or the value is neither an id nor a list of ids.
    """
    file = Path(model) / "generation_config.json"
    if Path(model).is_dir():
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found = config.get("eos_token_id") if isinstance(config, dict) else config
    else:
        from transformers import GenerationConfig

        try:
            found = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:
            found = None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id of {file} is {found!r}; it must be a token id or a list of token ids")
    return tuple(ids)
