"""Agent programs for tests, chosen by the first argument."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from openai import OpenAI


def post_reward(reward: float) -> None:
    request = urllib.request.Request(
        os.environ["AGENT_SESSION_URL"] + "/reward",
        data=json.dumps({"reward": reward}).encode(),
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).read()


def say(*messages: dict[str, Any]) -> dict[str, Any]:
    with OpenAI(max_retries=0) as model:
        reply = model.chat.completions.create(model="policy", messages=list(messages))  # type: ignore[arg-type]
    return reply.choices[0].message.model_dump(exclude_none=True)


HELLO = {"role": "user", "content": "hello"}


def main(what: str) -> None:
    if what == "silent":
        post_reward(1.0)
        return
    first = say(HELLO)
    match what:
        case "dies":
            sys.exit("it broke")
        case "hangs":
            Path(sys.argv[2]).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(600)
        case "rewrites":
            say(HELLO, first, {"role": "user", "content": "one"})
            say({"role": "user", "content": "a summary"})
            post_reward(0.25)
            time.sleep(600)  # ended by the worker
        case "secrets":
            post_reward(float(any("SECRET" in name for name in os.environ)))


if __name__ == "__main__":
    main(sys.argv[1])
