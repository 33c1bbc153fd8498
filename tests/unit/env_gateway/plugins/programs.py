"""An environment in which the model runs programs."""

from palimpsest.env import Task, from_tools, python_tool

Product = from_tools(
    start=lambda seed: Task("What is 6 times 7?"),
    tools=[python_tool(time_limit_s=60.0)],
    reward=lambda _state, answer: answer == "42",
)
