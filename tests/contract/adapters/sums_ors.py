"""An environment of the Open Reward Standard for tests: `python sums_ors.py PORT`, in the environment of openreward.

A task gives a number. The tool `add` counts up; `submit` ends the session and pays 1 if the sum is the number, else 0.
"""

import sys

from openreward.environments import Environment, Server, TextBlock, ToolOutput, tool
from pydantic import BaseModel

TASKS = 8


class Add(BaseModel):
    number: int


class NoArguments(BaseModel):
    pass


class Sums(Environment):
    def __init__(self, task_spec=None, secrets=None):  # type: ignore[no-untyped-def]
        super().__init__(task_spec=task_spec or {}, secrets=secrets or {})
        self.sum = 0

    @classmethod
    def list_splits(cls):  # type: ignore[no-untyped-def]
        return ["train"]

    @classmethod
    def list_tasks(cls, split):  # type: ignore[no-untyped-def]
        return [{"number": number + 2} for number in range(TASKS)]

    def get_prompt(self):  # type: ignore[no-untyped-def]
        return [TextBlock(text=f"Reach {self.task_spec['number']}.")]

    @tool
    def add(self, params: Add) -> ToolOutput:
        """Add a number."""
        self.sum += params.number
        return ToolOutput(blocks=[TextBlock(text=str(self.sum))], reward=0.0)

    @tool
    def submit(self, params: NoArguments) -> ToolOutput:
        """End the task."""
        reward = float(self.sum == self.task_spec["number"])
        return ToolOutput(blocks=[TextBlock(text="done")], reward=reward, finished=True)


if __name__ == "__main__":
    server = Server([Sums])
    app = server.app

    @app.get("/sums/sessions_count")
    def count():  # type: ignore[no-untyped-def]
        return len(server._active_envs)

    app.router.routes.insert(0, app.router.routes.pop())
    server.run(host="127.0.0.1", port=int(sys.argv[1]))
