"""`palimpsest env check` and `play`: each fault of an environment is found, and the built-in ones have none."""

import asyncio
import io
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.sessions.hosts import InProcess
from palimpsest.common.sessions.registry import CLASSES
from palimpsest.env import Environment, Message, Opening, Reply, Score, Turn
from palimpsest.services.env_gateway.checks.check import Findings, check
from tests.processes.programs import run_program


def checked(made: Callable[[], Environment]) -> Findings:
    async def opened() -> InProcess:
        return InProcess(made())

    return asyncio.run(check(opened, range(3), in_this_process=True))


@pytest.mark.parametrize("name", CLASSES)
def test_a_built_in_environment_has_no_problem(name: str) -> None:
    findings = checked(CLASSES[name])
    assert findings.problems == []
    assert findings.leaks.endswith("a closed session over 50 sessions")
    assert set(findings.seconds) == {"reset", "step", "finalize"}


class Plain:
    """Without faults; the faulty ones change one method."""

    version = "1"
    tools: Any = ()

    def reset(self, seed: int) -> Opening:
        return Opening((Message(role="user", content=f"task {seed}"),), self.tools)

    def step(self, turn: Turn) -> Reply | Score:
        return Score(0.0, False) if turn.answer is not None else Reply((Message(role="tool", content="ok"),))

    def finalize(self) -> Score:
        return Score(0.0, False)

    def state_hash(self) -> str:
        return ""


class GlobalRandom(Plain):
    def step(self, turn: Turn) -> Reply | Score:
        return Score(random.random(), False)


class SharedState(Plain):
    count = 0

    def reset(self, seed: int) -> Opening:
        SharedState.count = seed
        return super().reset(seed)

    def finalize(self) -> Score:
        return Score(SharedState.count / 10, False)

    def step(self, turn: Turn) -> Reply | Score:
        return self.finalize() if turn.answer is not None else super().step(turn)


class TooMuch(Plain):
    def step(self, turn: Turn) -> Reply | Score:
        return Score(1.5, True)


class Fragile(Plain):
    def step(self, turn: Turn) -> Reply | Score:
        if turn.calls:
            raise KeyError(turn.calls[0].name)
        return super().step(turn)


class OneTask(Plain):
    def reset(self, seed: int) -> Opening:
        return super().reset(0)


class NoDescription(Plain):
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}},)


class LeavesFiles(Plain):
    def reset(self, seed: int) -> Opening:
        OPEN.append(os.open(os.devnull, os.O_RDONLY))
        return super().reset(seed)


class Keeps(Plain):
    def reset(self, seed: int) -> Opening:
        KEPT.append(bytes(200_000))
        return super().reset(seed)


OPEN: list[int] = []
KEPT: list[bytes] = []


@pytest.mark.parametrize(
    ("faulty", "problem"),
    [
        (GlobalRandom, "the same session played again differs: the outcome of step 0"),
        (SharedState, "it differs while another session runs: the outcome of step 0"),
        (TooMuch, r"environment_invalid: reward is 1.5, not a number in \[0, 1\]"),
        (Fragile, "environment_raised: KeyError: 'no_such_tool'"),
        (OneTask, "seeds 0, 1, 2 all give the same first messages"),
        (NoDescription, "tool f: it has no description"),
        (NoDescription, "tool f: required but not in `properties`: x"),
        (LeavesFiles, r"50 closed sessions left \d+ open files behind"),
        (Keeps, r"a closed session leaves (19\d|2\d\d) KiB of memory behind"),
    ],
)
def test_a_fault_is_found(faulty: type[Plain], problem: str) -> None:
    try:
        assert any(re.search(problem, found) for found in checked(faulty).problems)
    finally:
        for descriptor in OPEN:
            os.close(descriptor)
        OPEN.clear()
        KEPT.clear()


def test_an_idle_policy_that_earns_is_a_remark() -> None:
    class Generous(Plain):
        def step(self, turn: Turn) -> Reply | Score:
            return Score(1.0, True)

    assert "a policy that says nothing earns 1.000 on average" in checked(Generous).remarks


MODULE = '''
from palimpsest.env import Task, from_tools, tool

@tool
def press(state: list, times: int) -> str:
    """Press the button."""
    state.append(times)
    return "pressed"

Button = from_tools(
    start=lambda seed: Task(f"Press {seed} times.", [seed]), tools=[press], reward=lambda s, _a: s[-1] == s[0] > 0
)
'''


def test_a_class_is_checked_and_played_without_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "buttons.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run_program("palimpsest", "env", "check", "buttons:Button")
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1] == "no problem found"
    typed = '/call press {"times": "3"}\n/call press {"times": 3\n/call press {"times": 3}\nready\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    played = run_program("palimpsest", "env", "play", "buttons:Button", "--seed=3")
    assert played.code == 0, played.err
    lines = played.out.splitlines()
    assert "[user] Press 3 times." in lines
    assert lines[-4].startswith("[tool] error: wrong arguments: times: Input should be a valid integer")
    assert lines[-3].startswith("[not sent] the arguments are not JSON")
    assert lines[-2:] == ["[tool] pressed", "[score] reward 1, success true, parts {}"]


def test_a_problem_ends_the_check_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_buttons.py").write_text(MODULE.replace("s[-1] == s[0] > 0", "3.0"))
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run_program("palimpsest", "env", "check", "broken_buttons:Button")
    assert done.code == 1
    assert "PROBLEM   seed 0, without a message: environment_invalid: reward is 3.0" in done.out
