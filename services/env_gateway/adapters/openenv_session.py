"""Environments of OpenEnv servers, over the WebSocket /ws; over HTTP, reset and step share no state.

An environment with tools offers them by the action `list_tools` and takes the action `call_tool`. Any other environment
takes an action with one text; `action_field` names it.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.message_tool import MESSAGE_ARGUMENT, MESSAGE_TOOL
from palimpsest.common.environments.port import Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.services.env_gateway.adapters.adapter import (
    NO_TOOLS,
    AdapterEnvironment,
    AdapterUnusable,
    function_schema,
    takes_messages,
    user,
)

CONNECT_S = 10.0
MAX_BYTES = 16 * 2**20
OWN_KEYS = ("done", "reward", "metadata", "tools")
"""Keys of an observation that are not for the model."""


class OpenEnvSession(AdapterEnvironment):
    """See port.py. `url` is the server, such as http://host:8000."""

    version = "openenv"
    extra = "openenv"

    def reset(self, seed: int) -> Opening:
        self.needed("url")
        client = self.imported("websockets.sync.client")
        address = self.settings.url.rstrip("/").replace("http", "ws", 1) + "/ws"
        self._connection = ExitStack()
        token = os.environ.get(self.settings.token_variable, "") if self.settings.token_variable else ""
        try:
            self._socket = self._connection.enter_context(
                client.connect(
                    address,
                    open_timeout=CONNECT_S,
                    max_size=MAX_BYTES,
                    additional_headers={"Authorization": f"Bearer {token}"} if token else None,
                )
            )
        except Exception as error:
            raise AdapterUnusable(f"{address} cannot be reached: {type(error).__name__}: {error}") from None
        self._seed, self._steps = seed % 2**31, 0
        self._tools = self._listed()
        found = self._asked("reset", {"seed": self._seed})
        self._first = found["observation"]
        text = _text(self._first)
        if not text:
            raise AdapterUnusable("the first observation of the environment is empty")
        shown = [one for one in self._tools if not takes_messages(one[0], one[2])]
        self._takes_messages = len(shown) < len(self._tools)
        return Opening((user(text),), tuple(function_schema(*one) for one in shown))

    def step(self, turn: Turn) -> Outcome:
        if turn.answer is not None:
            if self.settings.action_field:
                found = self._acted({self.settings.action_field: turn.answer})
                return self._ended() if found["done"] else Reply((user(_text(found["observation"])),))
            if self._takes_messages:
                found = self._called(MESSAGE_TOOL, {MESSAGE_ARGUMENT: turn.answer})
                return self._ended() if found["done"] else Reply((user(_result(found["observation"])),))
            return self._ended()
        messages, errors = [], 0
        known = {name for name, _, _ in self._tools}
        for call in turn.calls:
            if call.name not in known:
                errors += 1
                messages.append(Message(role="tool", content=f"there is no tool {call.name}" if known else NO_TOOLS))
                continue
            found = self._called(call.name, call.arguments)
            if found["done"]:
                return self._ended()
            observation = found["observation"]
            errors += observation.get("error") is not None
            messages.append(Message(role="tool", content=_result(observation)))
        return Reply(tuple(messages), errors)

    def finalize(self) -> Score:
        return self._ended()

    def state_hash(self) -> str:
        return hash_of(self._first, self._seed, self._steps)

    def close(self) -> None:
        if hasattr(self, "_socket"):
            try:
                self._socket.send(json.dumps({"type": "close"}))
            finally:
                self._connection.close()
                del self._socket

    def about(self) -> str:
        return f"OpenEnv at {self.settings.url}"

    def _ended(self) -> Score:
        score = self.score()
        self.close()
        return score

    def _listed(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """Return the tools; empty if the environment has none and `action_field` names its text."""
        if self.settings.action_field:
            return []
        try:
            found = self._asked("step", {"type": "list_tools"})["observation"].get("tools", [])
        except RuntimeError as error:
            raise AdapterUnusable(
                f"the environment has no tools; name the text of its action: action_field ({error})"
            ) from None
        if not found:
            raise AdapterUnusable("the environment has no tools; name the text of its action with action_field")
        return [(one["name"], one["description"], one["input_schema"]) for one in found]

    def _called(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return self._acted({"type": "call_tool", "tool_name": name, "arguments": arguments})

    def _acted(self, action: Mapping[str, Any]) -> dict[str, Any]:
        self._steps += 1
        found = self._asked("step", action)
        if found["reward"] is not None:
            self.rewards.append(float(found["reward"]))
        return found

    def _asked(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return the observation. A dead connection raises, because the step may be applied."""
        self._socket.send(json.dumps({"type": kind, "data": data}))
        reply = json.loads(self._socket.recv())
        if reply["type"] == "error":
            raise RuntimeError(f"the server failed at {kind}: {json.dumps(reply['data'])[:500]}")
        data = reply["data"]
        return {"observation": data["observation"], "reward": data.get("reward"), "done": bool(data.get("done"))}


def _text(observation: Mapping[str, Any]) -> str:
    """Return what the model reads: the only text of the observation, else the observation as JSON."""
    rest = {key: value for key, value in observation.items() if key not in OWN_KEYS and value not in (None, "", [], {})}
    texts = [value for value in rest.values() if isinstance(value, str)]
    return texts[0] if len(rest) == 1 and texts else json.dumps(rest) if rest else ""


def _result(observation: Mapping[str, Any]) -> str:
    """Return the result of a tool as text."""
    if (error := observation.get("error")) is not None:
        return f"error: {error.get('message', error) if isinstance(error, Mapping) else error}"
    result = observation.get("result")
    if isinstance(result, Mapping) and isinstance(result.get("content"), list):
        return "\n".join(str(one.get("text", "")) for one in result["content"])
    return result if isinstance(result, str) else json.dumps(result)
