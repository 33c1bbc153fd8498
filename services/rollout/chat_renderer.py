"""Between messages and tokens, by the model's own tokenizer and chat template.

Only what the environment says is ever tokenized, and only once: the model's messages stay the tokens it sampled. The
text that stands between a model message and the next one is found by rendering a dialogue in which the model said a
sentinel, and taking what comes after it; this holds for templates that rewrite earlier messages.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from palimpsest.common.model_path import WHOLE, refuse_absent, refuse_no_tokenizer, sentence
from palimpsest.common.sessions.wire import Message
from palimpsest.common.user_error import UserError

_SENTINEL = "\u241epalimpsest\u241e"


class ChatRenderer:
    """Renders for one model."""

    def __init__(self, tokenizer: Any, *, options: dict[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, options
        self.stop_tokens: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        self._begin = lru_cache(maxsize=4096)(self._begin_uncached)
        self._continue = lru_cache(maxsize=4096)(self._continue_uncached)
        self._special = frozenset(tokenizer.all_special_ids)

    @classmethod
    def load(cls, model: str, options: dict[str, Any]) -> "ChatRenderer":
        """The dialogue of a model folder. Raises UserError when its tokenizer cannot be used."""
        refuse_absent(model)
        refuse_no_tokenizer(model)
        try:
            tokenizer = _tokenizer(model)
        except Exception as error:
            raise UserError(f"model.path: {model} has no usable tokenizer ({sentence(error)}): {WHOLE}") from None
        if not tokenizer.chat_template:
            raise UserError(
                f"model.path: the tokenizer of {model} has no chat template, so a dialogue has no form: use an "
                f"instruction-tuned model, or put a chat_template.jinja into the folder"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.path: the tokenizer of {model} names no eos token, so no message would ever end")
        dialogue = cls(tokenizer, options=options)
        dialogue.check()
        return dialogue

    def begin(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Tokens of the first prompt, up to where the model's first message starts."""
        return self._begin(tuple(messages), _Tools(tools))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """The text of the first prompt, up to where the model's first message starts. `begin` gives its tokens."""
        return str(
            self._tokenizer.apply_chat_template(
                _plain(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True, **self._options
            )
        )

    def render_turn_separator(self, messages: Sequence[Message], *, after_stop: bool) -> tuple[int, ...]:
        """Tokens from the end of a model message to the start of the next.

        `after_stop`: the model ended its message itself, so the stop token is already there.
        """
        tokens = self._continue(tuple(messages))
        if after_stop and tokens[:1] and tokens[0] in self.stop_tokens:
            return tokens[1:]
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """What the model said, for the environment: without the stop token, with everything else."""
        return str(self._tokenizer.decode([t for t in tokens if t not in self.stop_tokens], skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Tokens of a bare text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def check(self) -> None:
        """Render a small dialogue. Raises UserError when the template cannot take tool output."""
        try:
            self.render_turn_separator([Message(role="tool", content="ok")], after_stop=True)
        except Exception as error:
            raise UserError(f"model.path: its chat template cannot render a tool's answer: {error}") from None

    def _begin_uncached(self, messages: tuple[Message, ...], tools: "_Tools") -> tuple[int, ...]:
        return tuple(self.encode(self.prompt(messages, tools.schemas)))

    def _continue_uncached(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        said = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
            *_plain(messages),
        ]
        text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **self._options)
        _, found, after = text.rpartition(_SENTINEL)
        if not found:
            raise ValueError("the template leaves out what the assistant said")
        return tuple(self.encode(after))


def _tokenizer(model: str) -> Any:
    """The tokenizer of the folder, as AutoTokenizer makes it.

    AutoTokenizer imports torch and what every model needs: four seconds of a core. A folder that names the general
    class itself, as transformers 5 saves it, does without.
    """
    named = Path(model) / "tokenizer_config.json"
    if named.is_file() and json.loads(named.read_text()).get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


class _Tools:
    """Tool schemas as a cache key: those of one environment are equal by their names."""

    def __init__(self, schemas: Sequence[dict[str, Any]]) -> None:
        self.schemas = tuple(schemas)
        self._key = repr(self.schemas)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tools) and other._key == self._key


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
