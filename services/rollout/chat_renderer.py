"""Converts messages to tokens and back, with the model's tokenizer and chat template.

Only environment messages are tokenized, each of them once; model messages keep their sampled tokens. To find the text
between two model messages, the renderer renders a dialogue whose model message is a sentinel and takes the text after
the sentinel. This also works for templates that rewrite earlier messages.
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
    """Renders dialogues for one model."""

    def __init__(self, tokenizer: Any, *, options: dict[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, options
        self.stop_tokens: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        self._begin = lru_cache(maxsize=4096)(self._begin_uncached)
        self._continue = lru_cache(maxsize=4096)(self._continue_uncached)
        self._special = frozenset(tokenizer.all_special_ids)

    @classmethod
    def load(cls, model: str, options: dict[str, Any]) -> "ChatRenderer":
        """Return the renderer of a model folder. Raises UserError if its tokenizer or template cannot be used."""
        refuse_absent(model)
        refuse_no_tokenizer(model)
        try:
            tokenizer = _tokenizer(model)
        except Exception as error:
            raise UserError(f"model.path: {model} has no usable tokenizer ({sentence(error)}): {WHOLE}") from None
        if not tokenizer.chat_template:
            raise UserError(
                f"model.path: the tokenizer of {model} has no chat template, so it cannot render a dialogue: use an "
                f"instruction-tuned model, or put a chat_template.jinja into the folder"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.path: the tokenizer of {model} has no eos token, so no message would ever end")
        dialogue = cls(tokenizer, options=options)
        dialogue.check()
        return dialogue

    def begin(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Return the tokens of the first prompt, up to the start of the first model message."""
        return self._begin(tuple(messages), _Tools(tools))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """Return the text of the first prompt, up to the first model message. `begin` returns its tokens."""
        return str(
            self._tokenizer.apply_chat_template(
                _plain(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True, **self._options
            )
        )

    def render_turn_separator(self, messages: Sequence[Message], *, after_stop: bool) -> tuple[int, ...]:
        """Return the tokens from the end of a model message to the start of the next one.

        `after_stop`: the model sampled the stop token, so the returned tokens leave it out.
        """
        tokens = self._continue(tuple(messages))
        if after_stop and tokens[:1] and tokens[0] in self.stop_tokens:
            return tokens[1:]
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of a model message for the environment, without the stop token."""
        return str(self._tokenizer.decode([t for t in tokens if t not in self.stop_tokens], skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def check(self) -> None:
        """Render a small dialogue. Raises UserError if the template cannot render tool output."""
        try:
            self.render_turn_separator([Message(role="tool", content="ok")], after_stop=True)
        except Exception as error:
            raise UserError(f"model.path: its chat template cannot render a tool's answer: {error}") from None

    def _begin_uncached(self, messages: tuple[Message, ...], tools: "_Tools") -> tuple[int, ...]:
        return tuple(self.encode(self.prompt(messages, tools.schemas)))

    def _continue_uncached(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        dialogue = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
            *_plain(messages),
        ]
        text = self._tokenizer.apply_chat_template(
            dialogue, tokenize=False, add_generation_prompt=True, **self._options
        )
        _, found, after = text.rpartition(_SENTINEL)
        if not found:
            raise ValueError("the template omits assistant messages")
        return tuple(self.encode(after))


def _tokenizer(model: str) -> Any:
    """Load the tokenizer of the folder; equivalent to AutoTokenizer.

    AutoTokenizer imports torch and the classes of every model, which takes four seconds of CPU time. A folder saved by
    transformers 5 names the generic class, which can be imported directly.
    """
    config = Path(model) / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text()).get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


class _Tools:
    """Tool schemas as a hashable cache key, equal if their representations are equal."""

    def __init__(self, schemas: Sequence[dict[str, Any]]) -> None:
        self.schemas = tuple(schemas)
        self._key = repr(self.schemas)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tools) and other._key == self._key


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
