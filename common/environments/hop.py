"""hop: follow a key to another key, that one to a value, and answer it. Three messages solve a task.

Reward: `first` 0.2 when the first tool call asks for the given key; `second` 0.2 when, after that, the second asks for
the key that the first returned; `answer` 0.6 when the answer is the value, both look-ups were made in this order, and
the latest look-up was of the end.
"""

import random

from palimpsest.common.environments.lookup import KEYS, TOOL, VALUES, WORDS
from palimpsest.common.environments.port import (
    Message,
    Opening,
    Outcome,
    Score,
    ToolCall,
    Turn,
    digest,
    generator,
)
from palimpsest.common.environments.single_call import (
    MAX_TURNS,
    ToolFailed,
    argument,
    first_call,
    reply_to_calls,
)
from palimpsest.common.environments.tool_calls import render

__all__ = ["WORDS", "Hop", "format_only", "solution"]


class Hop:
    """One task; the seed splits the keys into three that refer to another key and three that have a value."""

    version = "1"

    def reset(self, seed: int) -> Opening:
        """Name a key that refers to another key."""
        self._start, self._table = _task(seed)
        self._end = self._table[self._start]
        self._turns = 0
        self._calls: list[str | None] = []
        return Opening((Message(role="user", content=f"Follow {self._start} to its end."),), (TOOL,))

    def step(self, turn: Turn) -> Outcome:
        """Carry out one look-up, or score the answer."""
        self._turns += 1
        if turn.answer is not None:
            return self._score(turn.answer)
        call = first_call(turn)
        result = self._looked_up(call) if call is not None else None
        if not isinstance(result, str):
            self._calls.append(None)
        return self._score(None) if self._turns == MAX_TURNS else reply_to_calls(turn, result)

    def finalize(self) -> Score:
        """Score what was done so far."""
        return self._score(None)

    def state_hash(self) -> str:
        """Return a hash of the task and all values that the reward depends on."""
        return digest(self._start, self._table, self._turns, self._calls)

    def _looked_up(self, call: ToolCall) -> str | ToolFailed:
        try:
            key = argument(call, tool="lookup", name="key")
        except ToolFailed as failed:
            return failed
        if key not in self._table:
            return ToolFailed("unknown key")
        self._calls.append(key)
        return self._table[key]

    def _score(self, answer: str | None) -> Score:
        first = self._calls[:1] == [self._start]
        second = self._calls[:2] == [self._start, self._end]
        solved = answer == self._table[self._end] and self._followed()
        parts = {"first": 0.2 * first, "second": 0.2 * second, "answer": 0.6 * solved}
        return Score(sum(parts.values()), solved, parts)

    def _followed(self) -> bool:
        """Whether the start was looked up before the end, and the end last."""
        keys = [key for key in self._calls if key is not None]
        return keys[-1:] == [self._end] and self._start in keys


def solution(seed: int) -> list[str]:
    """Return the messages that look up the start and the end, and answer its value."""
    start, table = _task(seed)
    end = table[start]
    return [render("lookup", {"key": start}), render("lookup", {"key": end}), table[end]]


def format_only(seed: int, rng: random.Random) -> list[str]:  # noqa: ARG001 (must not depend on the task)
    """Return two look-ups of random keys and a random value."""
    return [*(render("lookup", {"key": rng.choice(KEYS)}) for _ in range(2)), rng.choice(VALUES)]


def _task(seed: int) -> tuple[str, dict[str, str]]:
    rng = generator(seed)
    keys = rng.sample(KEYS, len(KEYS))
    starts, ends = keys[:3], keys[3:]
    return starts[0], {**dict(zip(starts, ends, strict=True)), **{end: rng.choice(VALUES) for end in ends}}
