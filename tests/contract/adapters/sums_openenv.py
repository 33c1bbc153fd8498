"""An OpenEnv environment with tools for tests: `python sums_openenv.py PORT`, in the environment of openenv."""

import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Observation, State

OPEN = set()


class Goal(Observation):
    text: str


class Sums(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):  # type: ignore[no-untyped-def]
        mcp = FastMCP("sums")
        self.sum = self.wanted = 0
        self.finished = False

        @mcp.tool
        def add(number: int) -> str:
            """Add a number."""
            self.sum += number
            return str(self.sum)

        @mcp.tool
        def submit() -> str:
            """End the task."""
            self.finished = True
            return "done"

        super().__init__(mcp)
        OPEN.add(id(self))

    def reset(self, seed=None, **kwargs):  # type: ignore[no-untyped-def]
        self.sum, self.wanted, self.finished = 0, (seed or 0) % 5 + 1, False
        return Goal(done=False, reward=None, text=f"Reach {self.wanted}.")

    def _step_impl(self, action, timeout_s=None, **kwargs):  # type: ignore[no-untyped-def]
        return Observation(done=False, reward=None)

    def step(self, action, timeout_s=None, **kwargs):  # type: ignore[no-untyped-def]
        return self._paid(super().step(action, timeout_s=timeout_s, **kwargs))

    async def step_async(self, action, timeout_s=None, **kwargs):  # type: ignore[no-untyped-def]
        return self._paid(await super().step_async(action, timeout_s=timeout_s, **kwargs))

    def _paid(self, observation):  # type: ignore[no-untyped-def]
        if self.finished:
            observation.done, observation.reward = True, float(self.sum == self.wanted)
        return observation

    @property
    def state(self):  # type: ignore[no-untyped-def]
        return State(step_count=0)

    def close(self):  # type: ignore[no-untyped-def]
        OPEN.discard(id(self))
        super().close()


app = create_app(Sums, CallToolAction, CallToolObservation, env_name="sums", max_concurrent_envs=32)


@app.get("/sums/sessions_count")
def count() -> int:
    return len(OPEN)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
