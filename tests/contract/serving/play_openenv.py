"""Plays calls as a client of OpenEnv: `python play_openenv.py URL CALLS`, where openenv is installed. Prints JSON."""

import asyncio
import json
import sys

from openenv.core.env_server.mcp_types import CallToolAction
from openenv.core.generic_client import GenericEnvClient
from openenv.core.mcp_client import MCPToolClient


async def main(url: str, calls: list) -> dict:  # type: ignore[type-arg]
    async with GenericEnvClient(base_url=url) as client:
        opened = await client.reset(seed=3)
        for name, arguments in calls:
            taken = await client.step({"type": "call_tool", "tool_name": name, "arguments": arguments})
        state = await client.state()
    generic = {"prompt": opened.observation["prompt"], "reward": taken.reward, "done": taken.done, "state": state}
    async with MCPToolClient(base_url=url) as client:
        tools = [tool.name for tool in await client.list_tools()]
        await client.reset(seed=3)
        (name, arguments), *rest = calls
        text = await client.call_tool(name, **arguments)
        for name, arguments in rest:
            taken = await client.step(CallToolAction(tool_name=name, arguments=arguments))
    return {"generic": generic, "tools": tools, "text": text, "reward": taken.reward, "done": taken.done}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))))
