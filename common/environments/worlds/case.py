"""What the worlds share: the state of a session, the scripted user, and the score. Pure.

The score is that of tau-bench (Yao et al., 2024, arXiv:2406.12045): 1 if the database at the end equals the one that
the right calls give and the user got every required number, else 0. Texts, data and tasks are our own.
"""

import copy
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from palimpsest.common.environments.authoring.function_environment import FunctionEnvironment, Task, from_tools
from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.authoring.tools import FunctionTool
from palimpsest.common.environments.port import Message, Score, generator
from palimpsest.common.environments.single_call import ToolFailed
from palimpsest.common.environments.tool_calls import render

TASKS = {"train": 1000, "test": 200}
"""Number of tasks in each split. A task seed selects one of them: seed mod number."""
MAX_TURNS = 30
MAX_TELLING = 400
"""Longest message that can give the user a required number, in characters: a copy of all data does not count."""
CONFIRMING = ("confirm", "proceed", "shall i", "should i", "is that right", "is that ok")


@dataclass(frozen=True)
class Fact:
    """Something that the user says when asked for it."""

    keywords: tuple[str, ...]
    """Words in the agent's message that ask for it."""
    text: str


@dataclass(frozen=True)
class WorldTask:
    """One generated task with its solution."""

    database: dict[str, Any]
    request: str
    """The user's first message."""
    facts: tuple[Fact, ...]
    solution: tuple[str | tuple[str, dict[str, Any]], ...]
    """The right messages and calls, in order: a text for the user, or the name and the arguments of a tool."""
    information: tuple[str, ...] = ()
    """Numbers that the agent must give the user."""
    kind: str = ""


@dataclass
class Case:
    """The state of one session."""

    database: dict[str, Any]
    facts: tuple[Fact, ...]
    expected: str
    """Hash of the database after the right calls."""
    information: tuple[str, ...]
    given: set[int] = field(default_factory=set)
    """Facts that the user has stated."""
    heard: list[str] = field(default_factory=list)
    """The agent's messages to the user."""

    def table(self, name: str) -> dict[str, Any]:
        """Return a table of the database."""
        found: dict[str, Any] = self.database[name]
        return found

    def row(self, table: str, key: str) -> dict[str, Any]:
        """Return a row of a table. Raises ToolFailed."""
        found = self.table(table).get(key)
        if not isinstance(found, dict):
            raise ToolFailed(f"{table} has no {key}")
        return found


@dataclass(frozen=True)
class WorldDefinition:
    """A world: its policy, its tools and the generator of its tasks."""

    name: str
    policy: str
    tools: Sequence[FunctionTool]
    plan: Callable[[random.Random], WorldTask]
    act: Callable[[Case, str], str | None] = lambda _case, _text: None
    """What the user does after an instruction of the agent, with the report; None if the text has no instruction."""

    def plan_of(self, seed: int, split: str) -> WorldTask:
        """Return the task of this seed."""
        number = seed % TASKS[split]
        return self.plan(generator(int.from_bytes(f"{self.name}/{split}/{number}".encode())))

    def start(self, seed: int, split: str) -> Task:
        """Begin the task of this seed."""
        plan = self.plan_of(seed, split)
        case = Case(plan.database, plan.facts, "", plan.information)
        case.expected = self._expected(plan)
        messages = (Message(role="system", content=self.policy), Message(role="user", content=plan.request))
        return Task(messages, case)

    def user(self, case: Case, text: str) -> str | None:
        """Return the user's answer to a message of the agent; None ends the dialog."""
        case.heard.append(text)
        if (report := self.act(case, text)) is not None:
            return report
        lower = text.lower()
        asked = [number for number, fact in enumerate(case.facts) if any(word in lower for word in fact.keywords)]
        open_facts = [number for number in range(len(case.facts)) if number not in case.given]
        if "?" in text and any(words in lower for words in CONFIRMING) and not asked:
            return "Yes, please do that."
        if "?" not in text:
            asked = open_facts[:1]
        chosen = asked or open_facts[:1]
        if chosen:
            case.given |= set(chosen)
            return " ".join(case.facts[number].text for number in chosen)
        return "I do not know more than that." if "?" in text else None

    def score(self, case: Case, _answer: str | None) -> Score:
        """Return 1 if the database is right and the user got the required numbers, else 0."""
        database = hash_of(case.database) == case.expected
        information = all(any(states(text, number) for text in case.heard) for number in case.information)
        solved = database and information
        return Score(float(solved), solved, {"database": float(database), "information": float(information)})

    def solution(self, seed: int, split: str = "train") -> list[str]:
        """Return the model messages that solve the task of this seed."""
        return [step if isinstance(step, str) else render(*step) for step in self.plan_of(seed, split).solution]

    def environment(self, version: str) -> type[FunctionEnvironment]:
        """Return the class of the environment."""
        return from_tools(
            start=self.start,
            tools=self.tools,
            reward=self.score,
            user=self.user,
            version=version,
            splits=tuple(TASKS),
            max_turns=MAX_TURNS,
            description=f"{self.name}: a customer with a request, a policy, a database and tools",
        )

    def _expected(self, plan: WorldTask) -> str:
        """Return the hash of the database after the solution."""
        case = Case(copy.deepcopy(plan.database), plan.facts, "", plan.information)
        tools = {tool.name: tool for tool in self.tools}
        for step in plan.solution:
            if isinstance(step, str):
                self.user(case, step)
            else:
                tools[step[0]].run(case, step[1])
        return hash_of(case.database)


def states(text: str, number: str) -> bool:
    """Return whether a message of a reasonable length states the number.

    >>> states("It costs $1,250.", "1250"), states("It costs 12500.", "1250"), states("1250 " * 100, "1250")
    (True, False, False)
    """
    plain = text.replace(",", "")
    return len(text) <= MAX_TELLING and re.search(rf"(?<![\w.]){re.escape(number)}(?!\w|\.\d)", plain) is not None


def pick(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """Return different names in a random order."""
    return rng.sample(list(names), count)


def compact(row: Mapping[str, Any]) -> str:
    """Return a row as a tool shows it."""
    return json.dumps(row)
