"""An agent program for whole runs: continues its conversation, then sums it up, which begins a branch."""

import json
import os
import urllib.request
from typing import Any

from openai import OpenAI

SESSION = os.environ["AGENT_SESSION_URL"]


def ask(path: str = "", body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(SESSION + path, data, headers)) as reply:
        return json.load(reply)


def main() -> None:
    task, model = ask(), OpenAI()
    messages: list[Any] = [{"role": "user", "content": f"task {task['seed'] % 6}"}]
    for further in ("go on", "and now"):
        reply = model.chat.completions.create(model="policy", messages=messages)
        messages += [reply.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": further}]
    if task["sample"] % 3 == 0:
        messages = [{"role": "user", "content": "what happened so far"}]
    model.chat.completions.create(model="policy", messages=messages)
    ask("/reward", {"reward": float(task["sample"] % 2)})


if __name__ == "__main__":
    main()
