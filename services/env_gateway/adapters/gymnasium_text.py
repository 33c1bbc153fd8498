"""Gymnasium environments with text observations and text actions."""

from collections.abc import Sequence
from typing import Any

from palimpsest.common.environments.port import Message
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable, TextAdapter, user


class GymnasiumText(TextAdapter):
    """See port.py. `id` is that of gymnasium.make, such as `package.module:Name-v0`."""

    version = "gymnasium"
    extra = "gymnasium"

    def begin(self, seed: int) -> Sequence[Message]:
        self.needed("id")
        gymnasium = self.imported("gymnasium")
        self._environment = gymnasium.make(self.settings.id, disable_env_checker=True)  # it warns in each session
        spaces = self._environment.observation_space, self._environment.action_space
        if not all(isinstance(space, gymnasium.spaces.Text) for space in spaces):
            kinds = " and ".join(type(space).__name__ for space in spaces)
            raise AdapterUnusable(f"{self.settings.id} has the spaces {kinds}; both must be Text")
        observation, _ = self._environment.reset(seed=seed % 2**31)
        return [user(_text(observation))]

    def act(self, text: str) -> tuple[Sequence[Message], float, bool]:
        observation, reward, terminated, truncated, _ = self._environment.step(text)
        return [user(_text(observation))], float(reward), bool(terminated or truncated)

    def about(self) -> str:
        return f"{self.settings.id} of gymnasium"

    def close(self) -> None:
        if hasattr(self, "_environment"):
            self._environment.close()


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise TypeError(f"the observation is a {type(observation).__name__}, not a text")
    return observation
