"""add: have a sum calculated, then answer it. Two messages solve a task.

Reward: `call` 0.3 when the trajectory's first tool call asks the calculator for this very sum (either order, any
spaces); `answer` 0.7 when the answer is right and the latest expression calculated was this sum. A right answer without
the calculator pays nothing: the task is to use the tool, and a fixed answer would be right for one sum in ten.
"""

import random

from palimpsest.common.environments.calculator import TOOL, NotArithmetic, calculate
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

WORDS: tuple[str, ...] = tuple(str(number) for number in range(19))
"""The digits: sums go up to 18."""


class Add:
    """One task; the seed decides the two numbers."""

    version = "1"

    def reset(self, seed: int) -> Opening:
        """Ask for a sum of two digits."""
        self._left, self._right = _task(seed)
        self._turns = 0
        self._first_call_right: bool | None = None
        self._calculated = False
        return Opening((Message(role="user", content=f"What is {self._left} + {self._right}?"),), (TOOL,))

    def step(self, turn: Turn) -> Outcome:
        """Calculate one expression, or score the answer."""
        self._turns += 1
        if turn.answer is not None:
            return self._score(turn.answer)
        call = first_call(turn)
        result = self._result(call) if call is not None else None
        if self._first_call_right is None:
            self._first_call_right = self._calculated
        return self._score(None) if self._turns == MAX_TURNS else reply_to_calls(turn, result)

    def finalize(self) -> Score:
        """Score what was done so far."""
        return self._score(None)

    def state_hash(self) -> str:
        """Return a hash of the task and all values that the reward depends on."""
        return digest(self._left, self._right, self._turns, self._first_call_right, self._calculated)

    def _result(self, call: ToolCall) -> str | ToolFailed:
        try:
            expression = argument(call, tool="calculator", name="expression")
            value = calculate(expression)
        except ToolFailed as failed:
            return failed
        except NotArithmetic as error:
            return ToolFailed(str(error))
        sums = (f"{self._left}+{self._right}", f"{self._right}+{self._left}")
        self._calculated = "".join(expression.split()) in sums
        return value

    def _score(self, answer: str | None) -> Score:
        solved = answer == str(self._left + self._right) and self._calculated
        parts = {"call": 0.3 if self._first_call_right else 0.0, "answer": 0.7 if solved else 0.0}
        return Score(sum(parts.values()), solved, parts)


def solution(seed: int) -> list[str]:
    """Return the messages that calculate the sum and answer it."""
    left, right = _task(seed)
    return [render("calculator", {"expression": f"{left} + {right}"}), str(left + right)]


def format_only(seed: int, rng: random.Random) -> list[str]:  # noqa: ARG001 (must not depend on the task)
    """Return a random sum and a random number."""
    left, right, other = rng.randrange(10), rng.randrange(10), rng.randrange(19)
    return [render("calculator", {"expression": f"{left} + {right}"}), str(other)]


def _task(seed: int) -> tuple[int, int]:
    rng = generator(seed)
    return rng.randrange(10), rng.randrange(10)
