"""An environment with two splits, whose tasks are short: what the test model can read."""

from palimpsest.env import Task, from_tools

Words = from_tools(
    start=lambda seed, split: Task("What is the value of amber?" if split == "test" else "What is 3 + 4?"),
    reward=lambda _state, answer: float(bool(answer)),
    splits=("train", "test"),
)
