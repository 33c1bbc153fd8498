"""lookup: ask a table for a key's value, then answer with it. Two messages solve a task.

Reward: `call` 0.3 when the trajectory's first tool call is well formed and asks for the right key; `answer` 0.7 when
the answer is the value and the latest successful look-up was of the right key. A value guessed, or answered after
leafing through the table, pays nothing.
"""

import random

from palimpsest.common.environments.port import (
    Message,
    Opening,
    Outcome,
    Score,
    ToolCall,
    Turn,
    digest,
    generator,
    tool,
)
from palimpsest.common.environments.single_call import (
    MAX_TURNS,
    ToolFailed,
    argument,
    first_call,
    reply_to_calls,
)
from palimpsest.common.environments.tool_calls import render

KEYS = ("amber", "basil", "cedar", "delta", "ember", "fjord")
VALUES = ("1", "2", "3", "4", "5", "6")
WORDS: tuple[str, ...] = KEYS + VALUES
TOOL = tool("lookup", "Looks up the value of a key.", key="The key to look up.")


class Lookup:
    """One task; the seed decides the requested key and, independently, the value of every key."""

    version = "1"

    def reset(self, seed: int) -> Opening:
        """Ask for one key's value."""
        self._asked, self._table = _task(seed)
        self._turns = 0
        self._first_call_right: bool | None = None
        self._last_key: str | None = None
        return Opening((Message(role="user", content=f"What is the value of {self._asked}?"),), (TOOL,))

    def step(self, turn: Turn) -> Outcome:
        """Carry out one look-up, or score the answer."""
        self._turns += 1
        if turn.answer is not None:
            return self._score(turn.answer)
        call = first_call(turn)
        result = self._looked_up(call) if call is not None else None
        if self._first_call_right is None:
            self._first_call_right = self._last_key == self._asked
        return self._score(None) if self._turns == MAX_TURNS else reply_to_calls(turn, result)

    def finalize(self) -> Score:
        """Score what was done so far."""
        return self._score(None)

    def state_hash(self) -> str:
        """Return a hash of the task and all values that the reward depends on."""
        return digest(self._asked, self._table, self._turns, self._first_call_right, self._last_key)

    def _looked_up(self, call: ToolCall) -> str | ToolFailed:
        try:
            key = argument(call, tool="lookup", name="key")
        except ToolFailed as failed:
            return failed
        if key not in self._table:
            return ToolFailed("unknown key")
        self._last_key = key
        return self._table[key]

    def _score(self, answer: str | None) -> Score:
        solved = answer == self._table[self._asked] and self._last_key == self._asked
        parts = {"call": 0.3 if self._first_call_right else 0.0, "answer": 0.7 if solved else 0.0}
        return Score(sum(parts.values()), solved, parts)


def solution(seed: int) -> list[str]:
    """Return the messages that look up the key and answer its value."""
    asked, table = _task(seed)
    return [render("lookup", {"key": asked}), table[asked]]


def format_only(seed: int, rng: random.Random) -> list[str]:  # noqa: ARG001 (must not depend on the task)
    """Return a look-up of a random key and a random value."""
    return [render("lookup", {"key": rng.choice(KEYS)}), rng.choice(VALUES)]


def _task(seed: int) -> tuple[str, dict[str, str]]:
    rng = generator(seed)
    return rng.choice(KEYS), {key: rng.choice(VALUES) for key in KEYS}
