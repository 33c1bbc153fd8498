"""An agent program: plays a task of a taskset of verifiers 0.4 (docs/agents.md).

python verifiers_agent.py TASKSET: the name of a module with the taskset, or of one that verifiers has.
"""

import asyncio
import json
import os
import sys
import urllib.request
from itertools import islice
from typing import Any

from verifiers.v1 import EvalClientConfig, ModelContext, SingleAgentEnv, SingleAgentEnvConfig

SESSION = os.environ["AGENT_SESSION_URL"]


def ask(path: str = "", body: Any = None) -> Any:
    """Send a request about the session, and return the reply."""
    request = urllib.request.Request(  # noqa: S310 - the worker's own address
        SESSION + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:  # noqa: S310
        return json.load(reply)


async def main(taskset: str) -> None:
    """Play the task of the session's seed, and post the reward that verifiers computed."""
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    environment = SingleAgentEnv(SingleAgentEnvConfig.model_validate({"taskset": {"id": taskset}, "agent": agent}))
    tasks = list(islice(environment.taskset, 10_000))
    client = EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with environment.serving():
        played = await environment.run_episode(tasks[ask()["seed"] % len(tasks)], ModelContext("policy", client))
    problems = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
    if not played.ok or problems:
        sys.exit(f"verifiers: {problems}")  # an unknown reward is not 0
    reward = float(played.traces[0].reward)
    ask("/reward", {"reward": reward, "success": reward >= 1})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
