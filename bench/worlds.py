"""python -m bench worlds: what the solution and lazy policies earn in retail-mini, airline-mini and telecom-mini.

Every policy plays every task of the test split. Nothing is random, so the numbers are the same on every machine. The
JSON on the last line has the mean reward of each policy in each world.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from palimpsest.common.environments.port import Reply, Score
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.environments.worlds.case import MAX_TURNS, TASKS, WorldDefinition
from palimpsest.common.sessions.registry import WORLDS

Policy = Generator[str, str, None]
"""Yields messages of the model and receives the texts of the replies."""
SPLIT = "test"
QUESTIONS = ("What is your email address, member number or phone number?", "Which order or reservation is it?")
ID = {"retail-mini": r"R\d{4}", "airline-mini": r"reservation is (\w{5})", "telecom-mini": r"555-\d{4}"}
"""How a world's user names what the request is about."""
GUESSES: Mapping[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "retail-mini": (
        ("order_id", "deny_request", {"rule": 1}),
        ("order_id", "deny_request", {"rule": 3}),
        ("order_id", "deny_request", {"rule": 4}),
        ("order_id", "cancel_order", {"reason": "no longer needed"}),
    ),
    "airline-mini": (
        ("code", "deny_request", {"rule": 1}),
        ("code", "deny_request", {"rule": 2}),
        ("code", "deny_request", {"rule": 3}),
        ("code", "deny_request", {"rule": 6}),
        ("code", "cancel_reservation", {}),
    ),
    "telecom-mini": (
        ("phone", "close_case", {"result": "solved"}),
        ("phone", "close_case", {"result": "contract_ended"}),
    ),
}
"""World -> argument with the id, tool, other arguments: calls that need no work on the task."""


def does_nothing(_world: str) -> Policy:
    """Send empty messages."""
    while True:
        yield ""


def claims_success(_world: str) -> Policy:
    """State that everything is done."""
    while True:
        yield "It is done."


def only_asks(_world: str) -> Policy:
    """Ask for everything, then stop."""
    for question in QUESTIONS:  # noqa: UP028 (a tuple receives no replies)
        yield question
    while True:
        yield "It is done."


def guess(number: int) -> Callable[[str], Policy]:
    """Return the policy that asks for the id and makes the guess of this number."""

    def policy(world: str) -> Policy:
        heard = ""
        for question in QUESTIONS:
            heard += (yield question) + " "
        found = re.search(ID[world], heard)
        argument, tool, others = GUESSES[world][number]
        yield render(tool, {argument: found[found.re.groups] if found else "", **others})
        while True:
            yield "It is done."

    return policy


def recite(messages: Sequence[str]) -> Policy:
    """Send these messages, whatever the replies are."""
    for message in messages:  # noqa: UP028 (a list receives no replies)
        yield message


def reward(world: WorldDefinition, task: int, policy: Policy) -> float:
    """Play one task and return its reward."""
    environment = WORLDS[world.name][1](SPLIT)
    environment.reset(task)
    text = next(policy)
    for _ in range(MAX_TURNS):
        outcome = environment.step(read(text))
        if isinstance(outcome, Score):
            return outcome.reward
        assert isinstance(outcome, Reply)
        try:
            text = policy.send("\n".join(message.content for message in outcome.messages))
        except StopIteration:
            break
    return environment.finalize().reward


def lazy(world: str) -> dict[str, Callable[[], Policy]]:
    """Return the policies that do not work on the task."""
    found: dict[str, Callable[[], Policy]] = {
        "sends empty messages": partial(does_nothing, world),
        "claims success": partial(claims_success, world),
        "asks, then claims success": partial(only_asks, world),
    }
    for number, (_, tool, others) in enumerate(GUESSES[world]):
        label = f"asks, then always {tool} {' '.join(map(str, others.values()))}".strip()
        found[label] = partial(guess(number), world)
    return found


def measured() -> dict[str, dict[str, float]]:
    """Return world -> policy -> mean reward over the tasks of the test split."""
    found: dict[str, dict[str, float]] = {}
    for name, (world, _) in WORLDS.items():
        tasks = range(TASKS[SPLIT])
        found[name] = {"the solution": mean(reward(world, task, recite(world.solution(task, SPLIT))) for task in tasks)}
        for label, make in lazy(name).items():
            found[name][label] = round(mean(reward(world, task, make()) for task in tasks), 4)
    return found


def main(_arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure, print the table of docs/worlds.md, and return the numbers."""
    found = measured()
    for line in table(found):
        print(line)
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the numbers as the table of docs/worlds.md."""
    rows = ["| world | policy | mean reward |", "|---|---|---|"]
    return rows + [f"| {name} | {label} | {value:.3f} |" for name, by in found.items() for label, value in by.items()]
