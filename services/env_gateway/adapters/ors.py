"""Servers of the Open Reward Standard (ORS): HTTP with replies as server-sent events.

A session is the header X-Session-ID. The task of a seed is the index seed mod num_tasks. A call whose stream breaks is
resumed with its task_id; without one it may have been applied, so the session fails and its reward stays null.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.message_tool import MESSAGE_ARGUMENT, MESSAGE_TOOL
from palimpsest.common.environments.port import Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.services.env_gateway.adapters.adapter import (
    AdapterEnvironment,
    AdapterUnusable,
    function_schema,
    takes_messages,
    user,
)
from palimpsest.services.env_gateway.adapters.http_client import TLS

CONNECT_S = 10.0
RESUMES = 5
"""Number of times that one call is resumed."""


class OrsEnvironment(AdapterEnvironment):
    """See port.py. `url` is the server, `id` its environment (default: its first), `split` one of its splits."""

    version = "ors"

    def reset(self, seed: int) -> Opening:
        self.needed("url")
        token = os.environ.get(self.settings.token_variable, "") if self.settings.token_variable else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(
            base_url=self.settings.url, headers=headers, timeout=httpx.Timeout(CONNECT_S, read=None), verify=TLS
        )
        offered = self._get("/list_environments")
        self._name = self.settings.id or str(next(iter(offered), ""))
        if self._name not in offered:
            raise AdapterUnusable(f"{self.settings.url} has no environment {self._name!r}, only {', '.join(offered)}")
        splits = [str(split["name"]) for split in self._get(f"/{self._name}/splits")]
        if self.settings.split not in splits:
            raise AdapterUnusable(f"{self._name} has no split {self.settings.split!r}, only {', '.join(splits)}")
        self._tasks = int(self._post(f"/{self._name}/num_tasks", {"split": self.settings.split})["num_tasks"])
        if self._tasks < 1:
            raise AdapterUnusable(f"{self._name} has no tasks in the split {self.settings.split}")
        index = seed % self._tasks
        self._client.headers["X-Session-ID"] = self._begin()
        self._post("/create", {"env_name": self._name, "split": self.settings.split, "index": index})
        tools = self._get(f"/{self._name}/task_tools")
        self._terminal: Mapping[str, Any] | None = tools.get("terminal_tool")
        self._calls = 0
        self._first = hash_of(self._name, self.settings.split, index)
        prompt = _text(self._get(f"/{self._name}/prompt"))
        listed = [(one["name"], one["description"], one.get("input_schema") or {}) for one in tools["tools"]]
        shown = [one for one in listed if self._terminal is not None or not takes_messages(one[0], one[2])]
        self._takes_messages = len(shown) < len(listed)
        return Opening((Message(role="user", content=prompt),), tuple(function_schema(*one) for one in shown))

    def step(self, turn: Turn) -> Outcome:
        if turn.answer is not None:
            if self._terminal is not None:
                argument = self._terminal.get("arg")
                self._run(str(self._terminal["name"]), {argument: turn.answer} if argument else {})
            elif self._takes_messages:
                text, failed, finished = self._run(MESSAGE_TOOL, {MESSAGE_ARGUMENT: turn.answer})
                if not finished:
                    return Reply((user(text),), int(failed))
            return self._ended()
        messages, errors = [], 0
        for call in turn.calls:
            text, failed, finished = self._run(call.name, call.arguments)
            if finished:
                return self._ended()
            errors += failed
            messages.append(Message(role="tool", content=text))
        return Reply(tuple(messages), errors)

    def finalize(self) -> Score:
        return self._ended()

    def state_hash(self) -> str:
        return hash_of(self._first, self._calls)

    def close(self) -> None:
        if "X-Session-ID" in getattr(getattr(self, "_client", None), "headers", {}):
            self._post("/delete", {})
            self._post("/delete_session", {})
            del self._client.headers["X-Session-ID"]

    def about(self) -> str:
        return f"{self._name} at {self.settings.url} (ORS), {self._tasks} tasks"

    def _ended(self) -> Score:
        score = self.score()
        self.close()
        return score

    def _run(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool, bool]:
        """Call a tool. Return the text for the model, whether the call failed, and whether the session is over."""
        self._calls += 1
        found = json.loads(self._called({"name": name, "input": arguments}))
        if not found["ok"]:
            if found.get("reason") == "episode_finished":
                raise RuntimeError("the server ended the session earlier")
            return f"error: {found['error']}", True, False
        output = found["output"]
        if output.get("reward") is not None:
            self.rewards.append(float(output["reward"]))
        return _text(output["blocks"]), False, bool(output.get("finished"))

    def _called(self, body: dict[str, Any]) -> str:
        """Return the result of a call; a broken stream is resumed if its task_id came."""
        for _ in range(RESUMES + 1):
            text = ""
            try:
                for event, data in self._events(f"/{self._name}/call", body):
                    if event == "task_id":
                        body["task_id"] = data.strip()
                    elif event == "error":
                        raise RuntimeError(f"the server failed: {data}")
                    elif event in ("chunk", "end"):
                        text += data
                    if event == "end":
                        return text
            except httpx.TransportError:
                if "task_id" not in body:
                    raise
            if "task_id" not in body:
                break
        raise RuntimeError("the reply to a call was lost, and the call may have been applied")

    def _begin(self) -> str:
        for event, data in self._events("/create_session", None):
            if event == "task_id":
                return data.strip()
        raise AdapterUnusable(f"{self.settings.url} returned no id for a new session")

    def _events(self, path: str, body: Any) -> Iterator[tuple[str, str]]:
        """Yield name and data of each server-sent event."""
        with self._client.stream("POST", path, json=body) as reply:
            if reply.is_error:
                reply.read()
                raise RuntimeError(f"POST {path}: {reply.status_code}: {reply.text[:500]}")
            event, lines = "", list[str]()
            for line in reply.iter_lines():
                if not line:
                    if event:
                        yield event, "\n".join(lines)
                    event, lines = "", []
                elif line.startswith("event:"):
                    event = line.removeprefix("event:").strip()
                elif line.startswith("data:"):
                    lines.append(line.removeprefix("data:").removeprefix(" "))

    def _get(self, path: str) -> Any:
        return self._answered("GET", path, None)

    def _post(self, path: str, body: Any) -> Any:
        return self._answered("POST", path, body)

    def _answered(self, method: str, path: str, body: Any) -> Any:
        try:
            reply = self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise AdapterUnusable(f"{self.settings.url} cannot be reached: {error}") from None
        if reply.is_error:
            raise RuntimeError(f"{method} {path}: {reply.status_code}: {reply.text[:500]}")
        return reply.json()


def _text(blocks: Any) -> str:
    """Return the text of blocks. Raises AdapterUnusable for an image."""
    if any(block["type"] != "text" for block in blocks):
        raise AdapterUnusable("the environment sends images; only text is supported")
    return "\n".join(str(block["text"]) for block in blocks)
