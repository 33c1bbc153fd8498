"""Tasks for the tools of sums_mcp.py."""

from palimpsest.env import Task, from_tools

Sums = from_tools(
    start=lambda seed: Task(f"Add 1, {seed % 5 + 1} times.", seed % 5 + 1),
    reward=lambda state, answer: answer == "done",
)
