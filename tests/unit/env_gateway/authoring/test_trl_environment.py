"""`trl_environment`: what GRPOTrainer of TRL reads of a class of `environment_factory`, and does with it."""

import inspect
from typing import Any

import pytest
from transformers.utils import get_json_schema

from palimpsest.common.environments.lookup import Lookup
from palimpsest.common.environments.port import Message, Opening, Reply, Score, Turn
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.environments.worlds import retail
from palimpsest.env import Task, from_tools, tool, trl_environment


def tools(instance: Any) -> dict[str, Any]:
    """The tools that TRL 1.16 finds: functions of the class with a public name."""
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return {
        name: getattr(instance, name)
        for name in names
        if name not in ("reset", "get_reward") and not name.startswith("_")
    }


def solve(instance: Any, texts: list[str]) -> None:
    for turn in map(read, texts):
        for call in turn.calls:
            tools(instance)[call.name](**call.arguments)
        if turn.answer is not None:
            instance.send_message(text=turn.answer)


def test_the_schemas_are_those_of_the_environment() -> None:
    instance = trl_environment(retail.RetailMini)()
    own = {one["function"]["name"]: one["function"] for one in retail.RetailMini().reset(0).tools}
    assert set(tools(instance)) == {*own, "send_message"}
    for name, schema in own.items():
        found = get_json_schema(tools(instance)[name])["function"]
        assert found["description"] == schema["description"]
        assert found["parameters"]["properties"] == schema["parameters"]["properties"]
        assert found["parameters"].get("required", []) == schema["parameters"]["required"]


def test_the_solution_earns_1_in_an_instance_that_is_used_again() -> None:
    instance = trl_environment(retail.RetailMini)()
    for seed in (3, 4, 3):
        text = instance.reset(seed=seed, prompt=[{"role": "user", "content": ""}], other="column")
        assert text.endswith(retail.RetailMini().reset(seed).messages[-1].content)
        solve(instance, retail.WORLD.solution(seed, "train"))
        assert instance.get_reward() == 1.0
        assert instance.send_message(text="again") == "The task is over."
    instance.reset(seed=5)
    assert instance.get_reward() == 0.0  # nothing was done


def test_two_instances_do_not_share_their_state() -> None:
    made = trl_environment(Lookup, name="Mine")
    assert made.__name__ == "Mine"
    one, other = made(), made()
    one.reset(seed=3)
    other.reset(seed=3)
    one.lookup(key="basil")
    one.send_message("5")
    assert one.get_reward() == 1.0
    assert other.get_reward() == 0.0


def test_an_optional_argument_is_left_out_and_a_wrong_one_is_refused() -> None:
    @tool
    def put(state: list[Any], item: str, count: int = 1, note: str | None = None) -> str:
        """Put an item."""
        state.append((item, count, note))
        return str(len(state))

    made = trl_environment(from_tools(start=lambda seed: Task("Put.", []), reward=lambda s, a: len(s) / 9, tools=[put]))
    instance = made()
    schema = get_json_schema(instance.put)["function"]["parameters"]
    assert schema["required"] == ["item"]
    instance.reset(seed=0)
    assert instance.put(item="a") == "1"
    assert instance.put(item="b", count=2, note="n") == "2"
    with pytest.raises(TypeError, match="unexpected keyword argument 'price'"):
        instance.put(item="a", price=3)


def test_a_row_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="a row needs the column `seed`"):
        trl_environment(Lookup)().reset(prompt="x")


class Broken:
    """Fails at the second message, or returns a reward that is none."""

    version = "1"
    reward = float("nan")

    def reset(self, seed: int) -> Opening:
        return Opening((Message(role="user", content="go"),))

    def step(self, turn: Turn) -> Reply | Score:
        if turn.text == "raise":
            raise OSError("broken")
        return Score(self.reward, False)

    def finalize(self) -> Score:
        return Score(self.reward, False)

    def state_hash(self) -> str:
        return ""


@pytest.mark.parametrize("text", ["raise", "end", None])
def test_a_failure_gives_no_reward(text: str | None) -> None:
    instance = trl_environment(Broken)()
    instance.reset(seed=0)
    if text is not None:
        assert instance.send_message(text=text) == "The environment failed."
    assert instance.get_reward() is None


@pytest.mark.parametrize("name", ["reset", "get_reward", "_call", "two-words"])
def test_a_tool_that_cannot_be_a_method_is_refused(name: str) -> None:
    class Odd(Broken):
        def reset(self, seed: int) -> Opening:
            return Opening((Message(role="user", content="go"),), ({"function": {"name": name}},))

    with pytest.raises(ValueError, match=f"TRL cannot have a tool '{name}'"):
        trl_environment(Odd)
