"""Plays calls as a client of the Open Reward Standard: `python play_ors.py URL NAME CALLS`. Prints JSON."""

import asyncio
import json
import sys

from openreward import AsyncOpenReward


async def main(url: str, name: str, calls: list) -> dict:  # type: ignore[type-arg]
    client = AsyncOpenReward(base_url=url, api_key="none")
    environment = client.environments.get(name=name, base_url=url)
    tasks = await environment.list_tasks(split="train")
    async with environment.session(task=tasks[3]) as session:
        prompt = (await session.get_prompt())[0].text
        tools = [tool.name for tool in await session.list_tools()]
        for call, arguments in calls:
            output = await session.call_tool(call, arguments)
    splits = [str(getattr(split, "name", split)) for split in await environment.list_splits()]
    return {
        "splits": splits, "tasks": len(tasks), "prompt": prompt, "tools": tools, "reward": output.reward,
        "finished": output.finished,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))))
