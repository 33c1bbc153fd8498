"""Converts messages to tokens and back, with the model's tokenizer and chat template.

Only environment messages are tokenized, each of them once; model messages keep their sampled tokens. To find the text
between two model messages, the renderer renders a dialogue whose model message is a sentinel and takes the text after
the sentinel. This also works for templates that rewrite earlier messages.
"""

import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from palimpsest.common.byte_cache import ByteCache
from palimpsest.common.logs import logger
from palimpsest.common.model_path import WHOLE, refuse_absent, refuse_no_tokenizer, sentence
from palimpsest.common.sessions.wire import Message
from palimpsest.common.tokenizer import load_tokenizer
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout import template_proof
from palimpsest.services.rollout.plain_text import PlainText
from palimpsest.services.rollout.turn_ends import SENTINEL, control_tokens, find_turn_ends, generation_ids

BUNDLED = "tools"
"""The value of `model.chat_template` that chooses the bundled template."""
_CHATML = ("<|im_start|>", "<|im_end|>")
_THINK, _END_THINK = "<think>", "</think>"

CACHE_BYTES = 64 * 2**20
"""Maximum memory of the renderings of first prompts, and of those of answers."""
MESSAGE_BYTES, TOKEN_BYTES = 400, 36
"""Memory of a message besides its text, and of a token: its number and a reference."""


class RenderFailed(Exception):
    """The chat template or the tokenizer cannot render this dialogue."""


class ChatRenderer:
    """Renders dialogues for one model."""

    def __init__(self, tokenizer: Any, *, options: dict[str, Any], generation_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._ends = find_turn_ends(tokenizer, self._render, generation_ids)
        self.stop_tokens: tuple[int, ...] = self._ends.tokens
        """The tokens that end a model message; the first one is the template's own."""
        self._openings = ByteCache[tuple[tuple[Message, ...], _Tools], tuple[int, ...]](
            most_bytes=CACHE_BYTES, size=lambda key, tokens: _size(key[0], tokens) + key[1].size
        )
        self._answers = ByteCache[tuple[Message, ...], tuple[int, ...]](most_bytes=CACHE_BYTES, size=_size)
        self._control = control_tokens(tokenizer) | set(self.stop_tokens)
        texts = {token: tokenizer.convert_ids_to_tokens(token) for token in self._control}
        self._plain_text = PlainText(texts, self.encode)
        self._reasoning = self._opened_reasoning()

    @property
    def template(self) -> str:
        """The text of the chat template in use."""
        return str(self._tokenizer.chat_template)

    @property
    def portable_template(self) -> str:
        """The template in use, with the options of the run as defaults.

        `apply_chat_template` of transformers renders with it what the run renders; its caller can override an option.
        """
        defaults = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
            for name, value in sorted(self._options.items())
            if name.isidentifier()  # a template can read no other name
        )
        return f"{defaults}\n{self.template}" if defaults else self.template  # transformers drops this line break

    @classmethod
    def load(cls, model: str, options: dict[str, Any], template: str = "") -> "ChatRenderer":
        """Return the renderer of a model folder. Raises UserError if its tokenizer or template cannot be used.

        `template` is `model.chat_template`: empty for the model's own template, "tools", or a file.
        """
        refuse_absent(model)
        refuse_no_tokenizer(model)
        try:
            tokenizer = load_tokenizer(model)
        except Exception as error:
            raise UserError(f"model.path: {model} has no usable tokenizer ({sentence(error)}): {WHOLE}") from None
        if template:
            tokenizer.chat_template = _template(template)
        elif isinstance(tokenizer.chat_template, dict):
            named = tokenizer.chat_template
            tokenizer.chat_template = named.get("tool_use") or named.get("default")
        if not tokenizer.chat_template:
            raise UserError(
                f"model.path: the tokenizer of {model} has no chat template, so it cannot render a dialogue: use an "
                f'instruction-tuned model, set model.chat_template = "{BUNDLED}", or put a chat_template.jinja into '
                f"the folder"
            )
        if template == BUNDLED:
            special = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
            options = options | {"chatml": special.issuperset(_CHATML)}
        try:
            known = generation_ids(model)
        except ValueError as error:
            raise UserError(
                f"model.path: generation_config.json of {model} cannot be read: {sentence(error)}"
            ) from None
        dialogue = cls(tokenizer, options=options, generation_ids=known)
        if not dialogue.stop_tokens:
            raise UserError(
                f"model.path: no token ends a message of {model}: its tokenizer has no eos token, "
                f"generation_config.json lists none, and its chat template writes no special token after an "
                f"assistant message"
            )
        dialogue.check(f"model.chat_template: {template}" if template else f"model.path: the chat template of {model}")
        return dialogue

    def begin(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Return the tokens of the first prompt, up to the start of the first model message. Raises RenderFailed."""
        key = tuple(messages), _Tools(tools)
        return self._openings.get(key, lambda: self._begin_uncached(*key))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """Return the text of the first prompt, up to the first model message. `begin` returns its tokens.

        Raises RenderFailed.
        """
        try:
            return self._render(_plain(messages), True, tools)
        except Exception as error:
            raise _failed("the first prompt", messages, error) from error

    def render_turn_separator(self, messages: Sequence[Message], *, ended_by: int | None) -> tuple[int, ...]:
        """Return the tokens from the end of a model message to the start of the next one.

        `ended_by` is the stop token that the model sampled. The returned tokens leave out the token with which the
        template closes the message, whichever stop token the model sampled. They leave out a token that opens the next
        message only if the model sampled that token. With None, they leave out nothing. Raises RenderFailed.
        """
        key = tuple(messages)
        tokens = self._answers.get(key, lambda: self._continue_uncached(key))
        if ended_by is None:
            return tokens
        first = next((place for place, token in enumerate(tokens) if token in self._control), None)
        if first is None or self._tokenizer.decode(tokens[:first]).strip():
            return tokens
        closes = tokens[first] == ended_by or tokens[first] in self._ends.closing
        return tokens[first + 1 :] if closes else tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of a model message for the environment, without the stop token at its end.

        If the generation prompt opens the model's reasoning, the text starts with that opening.
        """
        message = tokens[:-1] if tokens and tokens[-1] in self.stop_tokens else tokens
        return self._reasoning + str(self._tokenizer.decode(message, skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def check(self, name: str) -> None:
        """Render probe dialogues. Raises UserError if the template, called `name`, leaves out a part of one."""
        fault = template_proof.find_fault(self._render)
        if fault is not None:
            raise UserError(
                f'{name} {fault}. Set model.chat_template = "{BUNDLED}" for the bundled template, or to the file of a '
                f"template that renders it (docs/models.md)"
            )
        error = self.refuses_system()
        if error is not None:
            logger().warning("chat template refuses system messages", template=name, error=error)

    def refuses_system(self) -> str | None:
        """Return the template's error for a system message; None if it renders one."""
        return template_proof.refuses_system(self._render)

    @property
    def stop_texts(self) -> list[str]:
        """The texts of the stop tokens."""
        return [str(self._tokenizer.convert_ids_to_tokens(token)) for token in self.stop_tokens]

    def _render(self, messages: Sequence[dict[str, str]], prompted: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompted,
                **self._options,
            )
        )

    def _opened_reasoning(self) -> str:
        """Return the text from an unclosed `<think>` in the generation prompt to its end; empty if there is none."""
        try:
            text = self._render([{"role": "user", "content": SENTINEL}], True)
        except Exception:  # what the template cannot render is reported by `check`
            return ""
        _, opened, rest = text.rpartition(SENTINEL)[2].rpartition(_THINK)
        return opened + rest if opened and _END_THINK not in rest else ""

    def _begin_uncached(self, messages: tuple[Message, ...], tools: "_Tools") -> tuple[int, ...]:
        try:
            guarded, schemas, mark = self._plain_text.protect(_plain(messages), tools.schemas)
            return tuple(self._plain_text.encode(self._render(guarded, True, schemas), mark))
        except Exception as error:
            raise _failed("the first prompt", messages, error) from error

    def _continue_uncached(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        try:
            guarded, _, mark = self._plain_text.protect(_plain(messages), ())
            dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}, *guarded]
            _, found, after = self._render(dialogue, True).partition(SENTINEL)
            if not found:
                raise ValueError("the template leaves out assistant messages")
            return tuple(self._plain_text.encode(after, mark))
        except Exception as error:
            raise _failed("the environment's answer", messages, error) from error


def _failed(what: str, messages: Sequence[Message], error: Exception) -> RenderFailed:
    roles = ", ".join(message.role for message in messages)
    return RenderFailed(f"the chat template cannot render {what} (roles: {roles}): {sentence(error)}")


def _template(chosen: str) -> str:
    """Return the template that `model.chat_template` chooses. Raises UserError if its file cannot be read."""
    if chosen == BUNDLED:
        return (resources.files(__package__) / "tools.jinja").read_text(encoding="utf-8")
    try:
        text = Path(chosen).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f'model.chat_template: {chosen} cannot be read ({sentence(error)}); name a file, or "{BUNDLED}" for the '
            f"bundled template"
        ) from None
    if not text.strip():
        raise UserError(f"model.chat_template: {chosen} is empty; it must hold a Jinja chat template")
    return text


class _Tools:
    """Tool schemas as a hashable cache key, equal if their representations are equal."""

    def __init__(self, schemas: Sequence[dict[str, Any]]) -> None:
        self.schemas = tuple(schemas)
        self._key = repr(self.schemas)
        self.size = 3 * sys.getsizeof(self._key)
        """Approximate memory in bytes: the text, and the objects that it describes."""

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tools) and other._key == self._key


def _size(messages: tuple[Message, ...], tokens: tuple[int, ...]) -> int:
    """Return the memory of a cached rendering in bytes."""
    texts = sum(sys.getsizeof(message.content) + MESSAGE_BYTES for message in messages)
    return texts + TOKEN_BYTES * len(tokens)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
