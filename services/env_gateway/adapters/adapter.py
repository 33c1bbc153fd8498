"""What the adapters share: their settings, the check at the start, and the mapping of rewards.

An adapter is an environment (environments/port.py) in a child process. Besides the methods of the port it has `close`,
which ends the session at the other side, and `probe`, which a child calls once before the gateway listens.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.message_tool import MESSAGE_ARGUMENT, MESSAGE_TOOL
from palimpsest.common.environments.port import Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.common.sessions.output_validation import check_opening

NO_TOOLS = "this environment has no tools: write the next action as text"


class AdapterUnusable(Exception):
    """The other side cannot be used; the text is a sentence with the remedy."""


class AdapterEnvironment:
    """See port.py. Base class of the adapters."""

    version = "1"
    extra: ClassVar[str] = ""
    """The extra of palimpsest that installs the package; empty if none is needed."""

    def __init__(self, settings: str) -> None:
        self.settings = AdapterConfig.model_validate_json(settings)
        self.rewards: list[float] = []
        """Rewards of the session so far."""

    def reset(self, seed: int) -> Opening:
        raise NotImplementedError

    def step(self, turn: Turn) -> Outcome:
        raise NotImplementedError

    def finalize(self) -> Score:
        return self.score()

    def state_hash(self) -> str:
        raise NotImplementedError

    def close(self) -> None:
        """End the session at the other side."""

    def about(self) -> str:
        """Return a line for the list of environments, after `reset`."""
        return self.settings.kind

    @classmethod
    def probe(cls, settings: str) -> str:
        """Begin and end one session. Return a line about the environment. Raises AdapterUnusable."""
        environment = cls(settings)
        try:
            opening = check_opening(environment.reset(0))
            return f"{environment.about()}, {len(opening.tools)} tools"
        finally:
            environment.close()

    def score(self) -> Score:
        """Return the score of the session: the sum of its rewards, mapped to [0, 1]."""
        return mapped(sum(self.rewards), self.settings.reward_range)

    def imported(self, module: str) -> Any:
        """Return the module of the adapter's package. Raises AdapterUnusable."""
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise AdapterUnusable(f"{error}; install palimpsest[{self.extra}] where the gateway runs") from None

    def needed(self, *keys: str) -> None:
        """Check that the settings have these keys. Raises AdapterUnusable."""
        for key in keys:
            if not getattr(self.settings, key):
                raise AdapterUnusable(f"kind {self.settings.kind!r} needs the key `{key}`")


class TextAdapter(AdapterEnvironment):
    """See port.py. Base class of adapters whose actions are the texts of messages."""

    def reset(self, seed: int) -> Opening:
        self._seed, self._steps = seed, 0
        messages = self.begin(seed)
        self._first = [message.model_dump() for message in messages]
        return Opening(tuple(messages))

    def step(self, turn: Turn) -> Outcome:
        if turn.answer is None:
            return Reply(tuple(Message(role="tool", content=NO_TOOLS) for _ in turn.calls), len(turn.calls))
        self._steps += 1
        messages, reward, done = self.act(turn.answer)
        self.rewards.append(reward)
        if done:  # the session ends here, so no step after the end can pay again
            return self.score()
        if not messages:
            raise ValueError("the environment continues without an observation")
        return Reply(tuple(messages))

    def state_hash(self) -> str:
        return hash_of(self._first, self._seed if self.settings.kind != "skyrl_gym" else 0, self._steps)

    def begin(self, seed: int) -> Sequence[Message]:
        """Begin the task and return its first messages."""
        raise NotImplementedError

    def act(self, text: str) -> tuple[Sequence[Message], float, bool]:
        """Take an action. Return the next messages, its reward, and whether the session is over."""
        raise NotImplementedError


def mapped(reward: float, bounds: tuple[float, float] | None) -> Score:
    """Return the score of a reward within `bounds`; [0, 1] if they are None. Raises ValueError.

    >>> mapped(0.5, (-1.0, 1.0)).reward
    0.75
    """
    low, high = bounds or (0.0, 1.0)
    slack = 1e-6 * (high - low)
    if not math.isfinite(reward) or not low - slack <= reward <= high + slack:
        where = "outside reward_range" if bounds else "outside [0, 1]; set reward_range = [lowest, highest]"
        raise ValueError(f"the environment's reward is {reward:g}, {where}")
    value = min(max((reward - low) / (high - low), 0.0), 1.0)
    return Score(value, value >= 1.0, {"own_reward": reward})


def takes_messages(name: str, schema: Mapping[str, Any]) -> bool:
    """Return whether this tool takes the model's messages without a tool call; then the model need not see it."""
    return name == MESSAGE_TOOL and set(schema.get("properties", {})) == {MESSAGE_ARGUMENT}


def user(text: str) -> Message:
    """Return a message of the user."""
    return Message(role="user", content=text)


def function_schema(name: str, description: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a tool's schema in the format of chat templates."""
    body = {"properties": {}, **(parameters or {}), "type": "object"}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": body}}
