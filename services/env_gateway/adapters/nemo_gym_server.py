"""Resources servers of NeMo Gym, over HTTP. Their tasks are the rows of a JSONL file, in the form of NeMo Gym's data
sets: `responses_create_params` with input and tools, and what the server's verification expects.

A session is the cookie that the server sets. A tool is a POST to its name; its reply is the result, whatever its status
says, because servers report failures of tools in replies with status 200. The server verifies once, on a response in
the form of OpenAI's Responses with all items of the session. The server has no request that ends a session.
"""

import json
from typing import Any

import httpx

from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.authoring.rows import read_rows
from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.port import Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.adapters.adapter import AdapterEnvironment, AdapterUnusable, function_schema
from palimpsest.services.env_gateway.adapters.http_client import TLS

CONNECT_S = 10.0
RESERVED = frozenset({"verify", "seed_session", "aggregate_metrics", "mcp"})
"""Routes of the server that are no tools."""
_TEXTS = ("text", "input_text", "output_text")


class NemoGymServer(AdapterEnvironment):
    """See port.py. `url` is the resources server, `tasks` the file with the rows."""

    version = "nemo_gym"

    def reset(self, seed: int) -> Opening:
        self.needed("url", "tasks")
        rows = self._rows()
        self._row = rows[row_of(seed, len(rows), 0)]
        self._count = len(rows)
        asked = self._row.get("responses_create_params")
        if not isinstance(asked, dict):
            raise AdapterUnusable(f"a row of {self.settings.tasks} has no responses_create_params")
        self._tools = {str(tool["name"]): tool for tool in asked.get("tools") or ()}
        if wrong := sorted(RESERVED & self._tools.keys()):
            raise AdapterUnusable(f"{self.settings.tasks} names {wrong[0]} as a tool, which is a route of the server")
        self._client = httpx.Client(base_url=self.settings.url, timeout=httpx.Timeout(CONNECT_S, read=None), verify=TLS)
        self._output: list[dict[str, Any]] = []
        self._calls = 0
        self._verified = False
        try:
            self._checked(self._client.post("/seed_session", json=self._row))
        except httpx.TransportError as error:
            raise AdapterUnusable(f"{self.settings.url} cannot be reached: {error}") from None
        schemas = (
            function_schema(name, tool.get("description") or "", tool.get("parameters"))
            for name, tool in self._tools.items()
        )
        return Opening(tuple(_messages(asked)), tuple(schemas))

    def step(self, turn: Turn) -> Outcome:
        if turn.answer is not None:
            self._say(turn.answer)
            return self._verify()
        if turn.text:
            self._say(turn.text)
        messages, errors = [], 0
        for call in turn.calls:
            text, failed = self._run(call.name, call.arguments)
            errors += failed
            messages.append(Message(role="tool", content=text))
        return Reply(tuple(messages), errors)

    def finalize(self) -> Score:
        return self._verify()

    def state_hash(self) -> str:
        return hash_of(self._row, self._calls)

    def close(self) -> None:
        if hasattr(self, "_client"):
            self._client.close()

    def about(self) -> str:
        return f"{self.settings.url} (NeMo Gym), {self._count} tasks"

    def _rows(self) -> Any:
        try:
            splits = read_rows(self.settings.tasks)
        except UserError as error:
            raise AdapterUnusable(str(error)) from None
        if self.settings.split not in splits:
            named = ", ".join(splits)
            raise AdapterUnusable(f"{self.settings.tasks} has no split {self.settings.split!r}, only {named}")
        return splits[self.settings.split]

    def _say(self, text: str) -> None:
        part = {"type": "output_text", "text": text, "annotations": []}
        name = f"msg_{len(self._output)}"
        self._output.append(
            {"type": "message", "id": name, "role": "assistant", "status": "completed", "content": [part]}
        )

    def _run(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Call a tool. Return its result, and whether the call failed as far as the status says."""
        self._calls += 1
        call = f"call_{self._calls}"
        item = {"type": "function_call", "id": f"fc_{self._calls}", "call_id": call, "name": name}
        self._output.append({**item, "arguments": json.dumps(arguments), "status": "completed"})
        if name not in self._tools:
            text, failed = f"error: there is no tool {name}", True
        else:
            reply = self._client.post(f"/{name}", json=arguments)
            if reply.status_code >= 500:
                raise RuntimeError(f"POST /{name}: {reply.status_code}: {reply.text[:500]}")
            text, failed = reply.text, reply.is_error
        self._output.append({"type": "function_call_output", "call_id": call, "output": text})
        return text, failed

    def _verify(self) -> Score:
        if self._verified:
            raise RuntimeError("the session was verified already")
        self._verified = True
        asked = self._row["responses_create_params"]
        response = {
            "id": "resp_1",
            "created_at": 0.0,
            "model": "policy",
            "object": "response",
            "output": self._output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": asked.get("tools") or [],
        }
        reward = self._checked(self._client.post("/verify", json={**self._row, "response": response})).get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise ValueError(f"the server verified with the reward {reward!r}")
        self.rewards.append(float(reward))
        return self.score()

    def _checked(self, reply: httpx.Response) -> dict[str, Any]:
        if reply.is_error:
            raise RuntimeError(f"POST {reply.request.url.path}: {reply.status_code}: {reply.text[:500]}")
        found = reply.json()
        return found if isinstance(found, dict) else {}


def _messages(asked: dict[str, Any]) -> list[Message]:
    """Return the first messages of a row. Raises AdapterUnusable for what is no text."""
    given = asked.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    found = [Message(role="system", content=str(asked["instructions"]))] if asked.get("instructions") else []
    for item in items:
        if item.get("type", "message") != "message" or item.get("role") not in (
            "system",
            "developer",
            "user",
            "assistant",
        ):
            raise AdapterUnusable(
                f"the input of a row has an item of type {item.get('type')!r}; only messages are read"
            )
        role = "system" if item["role"] == "developer" else item["role"]
        found.append(Message(role=role, content=_text(item["content"])))
    if not found:
        raise AdapterUnusable("a row has no input")
    return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part.get("type") not in _TEXTS for part in content):
        raise AdapterUnusable("a row has other content than text; only text is supported")
    return "".join(str(part["text"]) for part in content)
