"""Environments of typed functions, alone and as a plugin of the gateway."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from palimpsest.common.environments.authoring.state_hash import hash_of, plain
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.env import Message, Opening, Outcome, Reply, Score, Task, ToolFailed, from_tools, generator, tool


@dataclass
class Safe:
    number: int
    open: bool = False
    seen: set[str] = field(default_factory=set)


@tool
def turn_to(state: Safe, number: int) -> str:
    """Turn the dial."""
    if number > 99:
        raise ToolFailed("the dial ends at 99")
    state.seen.add(str(number))
    state.open = number == state.number
    return "open" if state.open else "closed"


@tool
def kick(state: Safe) -> str:
    """Kick the safe."""
    raise OSError("broken")


def start(seed: int, split: str) -> Task:
    """A safe with a dial."""
    return Task(f"Open the safe ({split}).", Safe(generator(seed).randrange(100)))


def reward(state: Safe, answer: str | None) -> Any:
    return state.open and answer == "done"


Dial = from_tools(start=start, tools=[turn_to, kick], reward=reward, splits=("train", "test"), max_turns=4)


def step(environment: Any, text: str) -> Outcome:
    return environment.step(read(text))


def test_a_task_is_solved_through_its_tools() -> None:
    environment = Dial()
    opening = environment.reset(3)
    assert isinstance(opening, Opening)
    assert [schema["function"]["name"] for schema in opening.tools] == ["turn_to", "kick"]
    number = generator(3).randrange(100)
    assert step(environment, render("turn_to", {"number": number})) == Reply((Message(role="tool", content="open"),))
    assert step(environment, "done") == Score(1.0, True)


def test_mistakes_of_the_model_are_replies_and_faults_of_a_tool_are_raised() -> None:
    environment = Dial()
    environment.reset(3)
    calls = render("turn_to", {"number": 100}) + render("nothing", {}) + render("turn_to", {"number": "x"})
    reply = step(environment, calls)
    assert isinstance(reply, Reply)
    assert [message.content for message in reply.messages] == [
        "error: the dial ends at 99",
        "error: there is no tool nothing",
        "error: wrong arguments: number: Input should be a valid integer",
    ]
    assert reply.tool_errors == 3
    with pytest.raises(OSError, match="broken"):
        step(environment, render("kick", {}))


def test_the_last_turn_is_scored_without_an_answer() -> None:
    environment = Dial()
    environment.reset(3)
    call = render("turn_to", {"number": generator(3).randrange(100)})
    assert [type(step(environment, call)) for _ in range(4)] == [Reply, Reply, Reply, Score]


def test_a_user_answers_messages_until_the_dialog_ends() -> None:
    talk = from_tools(
        start=lambda seed: Task([Message(role="system", content="Be kind."), Message(role="user", content="hi")], []),
        reward=lambda state, answer: 0.25 * len(state),
        user=lambda state, text: None if text == "bye" else (state.append(text) or f"{len(state)}"),  # type: ignore[func-returns-value]
    )
    environment = talk()
    assert [message.role for message in environment.reset(0).messages] == ["system", "user"]
    assert step(environment, "a") == Reply((Message(role="user", content="1"),))
    assert step(environment, "bye") == Score(0.25, False)


def test_splits_are_known_by_name() -> None:
    assert Dial("test").reset(0).messages[0].content == "Open the safe (test)."
    with pytest.raises(ValueError, match="there is no split 'dev'; this environment has train, test"):
        Dial("dev")


def test_the_state_hash_changes_with_the_state_and_not_with_the_order_of_a_set() -> None:
    environment = Dial()
    environment.reset(3)
    first = environment.state_hash()
    step(environment, render("turn_to", {"number": 1}))
    assert environment.state_hash() != first
    assert plain({"a", "b"}) == plain({"b", "a"}) == ["a", "b"]
    with pytest.raises(TypeError, match="a object in the state has no plain form; pass state_hash=function"):
        hash_of(object())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tools": [turn_to, turn_to]}, "two tools are named turn_to"),
        ({"max_turns": 0}, "`max_turns` is at least 1"),
        ({"splits": ()}, "`splits` has at least one name"),
    ],
)
def test_wrong_definitions_are_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        from_tools(start=start, reward=reward, **arguments)


def test_a_tool_cannot_have_a_name_of_the_port() -> None:
    def finalize() -> None:
        """Text."""

    with pytest.raises(ValueError, match="a tool cannot be named finalize"):
        from_tools(start=start, reward=reward, tools=[finalize])
