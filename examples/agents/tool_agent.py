"""An agent program: solves the task of its session with the official OpenAI client (docs/agents.md)."""

import json
import os
import urllib.request
from typing import Any

from openai import OpenAI

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


def main() -> None:
    """Alternate messages of the model and steps in the environment until the environment ends the session."""
    task, model = ask(), OpenAI()
    messages = list(task["messages"])
    while True:
        reply = model.chat.completions.create(model="policy", messages=messages, tools=task["tools"])
        message = reply.choices[0].message
        calls = [
            {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
            for call in message.tool_calls or ()
        ]
        step = ask("/step", {"calls": calls} if calls else {"text": message.content or ""})
        if step["ended"]:
            return
        messages += [message.model_dump(exclude_none=True), *step["messages"]]


if __name__ == "__main__":
    main()
