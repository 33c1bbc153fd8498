"""The port of environments.

One instance serves one session: `reset` is called once, then `step` once for each message of the model until it returns
a Score; `finalize` may replace any further step. The same seed and the same turns give the same results, for any other
activity in the process: an instance has its own random.Random and reads no clock.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from palimpsest.common.sessions.wire import Message, ToolCall

__all__ = [
    "Environment",
    "EnvironmentFailed",
    "FailureCode",
    "Malformed",
    "Message",
    "Opening",
    "Outcome",
    "Reply",
    "Score",
    "TaskFamily",
    "ToolCall",
    "Turn",
    "digest",
    "generator",
    "tool",
]


@dataclass(frozen=True, slots=True)
class Malformed:
    """A malformed tool call of the model. The gateway answers it with a remark."""

    problem: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One parsed message of the model."""

    text: str
    """The text outside tool calls and reasoning, stripped."""
    attempts: tuple[ToolCall | Malformed, ...] = ()
    """Its tool calls in order, including malformed ones."""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The well-formed calls."""
        return tuple(attempt for attempt in self.attempts if isinstance(attempt, ToolCall))

    @property
    def answer(self) -> str | None:
        """The text of a final message, which has no tool call; else None."""
        return None if self.attempts else self.text


@dataclass(frozen=True, slots=True)
class Opening:
    """The first messages and the tools of a session."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas in the format of chat templates; `tool` creates one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The messages with which the session continues; empty only if every call of the turn was malformed."""

    messages: tuple[Message, ...]
    tool_errors: int = 0
    """Number of failed calls of this turn, for a metric."""


@dataclass(frozen=True, slots=True)
class Score:
    """The end of a session."""

    reward: float
    """In [0, 1]."""
    success: bool
    """Whether the task is solved, apart from the reward."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Components of the reward; each finite."""


Outcome = Reply | Score

FailureCode = Literal["environment_raised", "environment_invalid", "environment_timeout", "environment_crashed"]


class Environment(Protocol):
    """One session's task and state."""

    version: str
    """Must change whenever the same seed and turns can give another result."""

    def reset(self, seed: int) -> Opening:
        """Begin the task of this seed."""

    def step(self, turn: Turn) -> Outcome:
        """Process one message of the model."""

    def finalize(self) -> Score:
        """Score the current state; no message follows."""

    def state_hash(self) -> str:
        """Return a hash that is equal for equal states, in every process."""


class TaskFamily(Protocol):
    """A built-in family of tasks, with the functions that prepare a model for it."""

    WORDS: tuple[str, ...]
    """Every word that varies between tasks."""

    def solution(self, seed: int) -> list[str]:
        """The model messages that solve this task, exactly as a model should write them."""

    def format_only(self, seed: int, rng: random.Random) -> list[str]:
        """Well-formed messages whose content is drawn from `rng` and has nothing to do with the task."""


class EnvironmentFailed(Exception):
    """The environment failed: the session ends as `error`, and its reward is unknown."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code


def generator(seed: int) -> random.Random:
    """Return the random generator of a task."""
    return random.Random(seed)  # noqa: S311 (tasks are drawn, not secrets)


def digest(*parts: Any) -> str:
    """Return a hash of JSON-like values, for `state_hash`."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """Return the schema of a tool whose parameters are all required strings, given as name=description."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": text} for key, text in parameters.items()},
                "required": list(parameters),
            },
        },
    }
