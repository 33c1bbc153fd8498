"""The model of tau2-bench's simulated user and of its judge, scripted. It sees only the requests."""

import json
import re
from typing import Any

from tests.servers.chat_endpoint import Answer, spoken

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def asked(tool: str, arguments: dict[str, Any] | None) -> str:
    """Return a message that asks the user to use a tool. arguments: None if the user knows them."""
    return f"Please use {tool}{'' if arguments is None else ' with ' + json.dumps(arguments)}."


def answer(request: dict[str, Any]) -> Answer:
    """Do what `asked` asks, say yes to "Is that all?", end at "Goodbye.", and judge every outcome as met."""
    last = request["messages"][-1]
    text = last["content"] or ""
    if "expectedOutcomes" in text:
        result = {"expectedOutcome": "it", "reasoning": "It happened.", "metExpectation": True}
        return spoken(json.dumps({"results": [result]}), usage=USAGE)
    if last["role"] == "tool":
        return spoken("I did that.", usage=USAGE)
    if found := re.fullmatch(r"Please use (\w+) with (.*)\.", text):
        return spoken(None, usage=USAGE, calls=((found[1], json.loads(found[2])),))
    return spoken("###STOP###" if text == "Goodbye." else "Yes.", usage=USAGE)
