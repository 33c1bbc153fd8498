"""The tasks of the MCP adapter in `python -m bench gateway`."""

from palimpsest.env import Task, from_tools

Echo = from_tools(start=lambda seed: Task(f"Task {seed}."), reward=lambda _state, _answer: 1.0, max_turns=10**6)
