"""Keeps text of the environment from becoming a control token.

A tokenizer turns `<|im_end|>` into the control token wherever the text has it. The guard inserts a break mark into such
text before the template renders it, and the rendered text is tokenized in pieces that end at the marks.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

_MARKS = range(0xE000, 0xF900)
"""Private-use characters."""


class PlainText:
    """Encodes rendered dialogues in which text of the environment stays text.

    `control`: the text of each control token, by its id.
    """

    def __init__(self, control: dict[int, str], encode: Callable[[str], list[int]]) -> None:
        self._control, self._encode = frozenset(control), encode
        names = sorted(filter(None, control.values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._beginnings = tuple({name[:length] for name in names for length in range(1, len(name))})

    def protect(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]]) -> tuple[Any, Any, str]:
        """Return the messages and tools with break marks in their texts, and the mark; no mark if none is needed."""
        contents = [message["content"] for message in messages]
        schemas = repr(tools)
        joined = "\n".join((*contents, schemas))
        ends = tuple(content for content in contents if content.endswith(self._beginnings))
        if self._names is None or not (ends or self._names.search(joined)):
            return messages, tools, ""
        mark = next(chr(code) for code in _MARKS if chr(code) not in joined and repr(chr(code))[1:-1] not in schemas)
        guarded = [message | {"content": self._broken(message["content"], mark, end=True)} for message in messages]
        return guarded, self._walk(list(tools), mark), mark

    def encode(self, text: str, mark: str) -> list[int]:
        """Return the tokens of a rendered text. Raises ValueError if environment text became a control token."""
        if not mark:
            return self._encode(text)
        tokens = [token for piece in text.split(mark) if piece for token in self._encode(piece)]
        if self._found(tokens) != self._found(self._encode(text)):
            raise ValueError("a text of the environment becomes a control token")
        return tokens

    def _found(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token in self._control]

    def _broken(self, text: str, mark: str, *, end: bool) -> str:
        """Return the text with a mark after the first character of each control token.

        `end`: also after a beginning of one at the end of the text, which the next text could complete.
        """
        assert self._names is not None
        broken = self._names.sub(lambda found: found[0][:1] + mark + found[0][1:], text)
        return broken + mark if end and text.endswith(self._beginnings) else broken

    def _walk(self, value: Any, mark: str) -> Any:
        match value:
            case str():
                return self._broken(value, mark, end=False)
            case dict():
                return {self._walk(key, mark): self._walk(inner, mark) for key, inner in value.items()}
            case list() | tuple():
                return [self._walk(inner, mark) for inner in value]
        return value
