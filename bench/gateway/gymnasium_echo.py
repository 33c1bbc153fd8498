"""A Gymnasium environment that echoes, for `python -m bench gateway --adapters gymnasium`."""

from typing import Any

import gymnasium
from gymnasium.spaces import Text


class Echo(gymnasium.Env):  # type: ignore[misc]
    """Returns the action."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = Text(200), Text(200)

    def reset(self, *, seed: int | None = None, **_options: Any) -> tuple[str, dict[str, Any]]:
        """Begin."""
        super().reset(seed=seed)
        return "Write.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return the action."""
        return action, 0.0, False, False, {}


gymnasium.register("Echo-v0", "bench.gateway.gymnasium_echo:Echo")
