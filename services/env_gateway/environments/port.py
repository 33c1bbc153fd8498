"""What an environment is.

One instance serves one session: `reset` is called once, then `step` once for each message of the model, until it
returns a Score; `finalize` may take the place of any further step. An instance that is given the same seed and the same
turns answers the same, whatever else runs in the process: it owns its random.Random and reads no clock.
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
    """The model tried to call a tool, but not in the form of a call. The gateway tells it so."""

    problem: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the model, read."""

    text: str
    """What it says outside tool calls and reasoning, stripped."""
    attempts: tuple[ToolCall | Malformed, ...] = ()
    """Its tool calls in order, those that cannot be read included."""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that could be read."""
        return tuple(attempt for attempt in self.attempts if isinstance(attempt, ToolCall))

    @property
    def answer(self) -> str | None:
        """The text of a final message, which is one that tries no tool call; else None."""
        return None if self.attempts else self.text


@dataclass(frozen=True, slots=True)
class Opening:
    """How a session begins."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas as chat templates take them; `tool` makes one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The session goes on with these messages; empty only if every attempt of the turn was malformed."""

    messages: tuple[Message, ...]
    tool_errors: int = 0
    """Calls of this turn that could not be carried out; counted, nothing else."""


@dataclass(frozen=True, slots=True)
class Score:
    """The session is over."""

    reward: float
    """In [0, 1]."""
    success: bool
    """Whether the task is solved, apart from the reward."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward is made of; each finite."""


Outcome = Reply | Score

FailureCode = Literal["environment_raised", "environment_invalid", "environment_timeout", "environment_crashed"]


class Environment(Protocol):
    """One session's task and state."""

    version: str
    """Changes whenever the same seed and turns may give something else."""

    def reset(self, seed: int) -> Opening:
        """Begin the task of this seed."""

    def step(self, turn: Turn) -> Outcome:
        """Take one message of the model."""

    def finalize(self) -> Score:
        """Score what there is: no message follows."""

    def state_hash(self) -> str:
        """Equal for equal states, in any process."""


class TaskFamily(Protocol):
    """A built-in family of tasks, and what is needed to prepare a model for it."""

    WORDS: tuple[str, ...]
    """Every word that varies between tasks."""

    def solution(self, seed: int) -> list[str]:
        """The model messages that solve this task, exactly as a model should write them."""

    def format_only(self, seed: int, rng: random.Random) -> list[str]:
        """Well-formed messages whose content is drawn from `rng` and has nothing to do with the task."""


class EnvironmentFailed(Exception):
    """The environment did not do its part: the session ends as `error`, its reward stays unknown."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code


def generator(seed: int) -> random.Random:
    """The task's own source of chance."""
    return random.Random(seed)  # noqa: S311 (tasks are drawn, not secrets)


def digest(*parts: Any) -> str:
    """A hash of JSON-like values, for `state_hash`."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """The schema of a tool whose parameters are all required strings, given as name=description."""
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
