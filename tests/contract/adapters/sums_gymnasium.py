"""A Gymnasium environment with text spaces for tests. It pays 1 for the right number of `add`, else -1."""

import gymnasium
from gymnasium.spaces import Text


class Sums(gymnasium.Env):  # type: ignore[misc, type-arg]
    def __init__(self) -> None:
        self.observation_space, self.action_space = Text(200), Text(200)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.wanted, self.sum = int(self.np_random.integers(1, 9)), 0
        return f"Task {seed}: write add, {self.wanted} times, then submit.", {}

    def step(self, action):  # type: ignore[no-untyped-def]
        if action == "add":
            self.sum += 1
            return str(self.sum), 0.0, False, False, {}
        return "end", 1.0 if self.sum == self.wanted else -1.0, True, False, {}


gymnasium.register("Sums-v0", "sums_gymnasium:Sums")
