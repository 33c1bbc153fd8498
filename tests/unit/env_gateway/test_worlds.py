"""The customer-service worlds: solutions, lazy policies, splits, the scripted user, and the score."""

from pathlib import Path

import pytest

from bench.worlds import measured, table
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.environments.worlds.case import TASKS, states
from palimpsest.common.environments.worlds.telecom import SETTINGS
from palimpsest.common.sessions.registry import WORLDS, built_in
from palimpsest.env import Message, Reply, Score

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def played(world: str, seed: int, texts: list[str], split: str = "train") -> Score:
    environment = WORLDS[world][1](split)
    environment.reset(seed)
    for text in texts:
        outcome = environment.step(read(text))
        if isinstance(outcome, Score):
            return outcome
    return environment.finalize()


def test_the_solution_of_a_task_earns_exactly_1(world: str) -> None:
    for seed in range(100):
        score = played(world, seed, WORLDS[world][0].solution(seed))
        assert score == Score(1.0, True, {"database": 1.0, "information": 1.0})


def test_a_solution_without_its_last_call_earns_nothing(world: str) -> None:
    for seed in range(50):
        texts = WORLDS[world][0].solution(seed)
        last = max(number for number, text in enumerate(texts) if "<tool_call>" in text)
        assert played(world, seed, texts[:last] + texts[last + 1 :]).reward == 0.0


def test_a_solution_that_states_another_number_earns_nothing(world: str) -> None:
    seeds = [seed for seed in range(100) if WORLDS[world][0].plan_of(seed, "train").information]
    assert len(seeds) > 10
    for seed in seeds:
        (number,) = WORLDS[world][0].plan_of(seed, "train").information
        *texts, ending = WORLDS[world][0].solution(seed)
        score = played(world, seed, [*texts, ending.replace(number, f"1{number}")])
        assert score == Score(0.0, False, {"database": 1.0, "information": 0.0})


def test_no_task_is_in_both_splits_or_twice(world: str) -> None:
    plans = [WORLDS[world][0].plan_of(seed, split) for split, count in TASKS.items() for seed in range(count)]
    assert len({repr((plan.request, plan.database, plan.facts)) for plan in plans}) == sum(TASKS.values())


def test_a_seed_repeats_after_all_tasks_and_gives_the_same_session(world: str) -> None:
    made = WORLDS[world][1]
    one, other = made("test"), made("test")
    assert one.reset(3) == other.reset(203)
    assert one.state_hash() == other.state_hash()
    assert one.reset(4) != other.reset(203)


def test_both_splits_are_environments(world: str) -> None:
    assert {world, f"{world}.test"} <= built_in().keys()


@pytest.mark.thorough
def test_the_page_has_the_measured_rewards_of_the_policies() -> None:
    found = measured()
    assert all(by["the solution"] == 1.0 and max(list(by.values())[1:]) < 0.25 for by in found.values())
    assert all(by["sends empty messages"] == by["claims success"] == 0.0 for by in found.values())
    assert "\n".join(table(found)) in (DOCS / "worlds.md").read_text()


def test_the_user_gives_a_detail_when_asked_and_ends_the_dialog_when_all_are_given() -> None:
    environment = WORLDS["retail-mini"][1]()
    environment.reset(1)

    def say(text: str) -> str | Score:
        outcome = environment.step(read(text))
        return outcome.messages[0].content if isinstance(outcome, Reply) else outcome

    assert str(say("Which order is it?")).startswith("It is order R")
    assert str(say("Shall I confirm?")) == "Yes, please do that."
    assert str(say("Let me see.")).startswith("My email address is ")
    say("Which color?")
    assert say("How old are you?") == "I do not know more than that."
    assert isinstance(say("Good bye."), Score)


def test_the_user_of_a_phone_does_what_the_agent_instructs() -> None:
    environment = WORLDS["telecom-mini"][1]()
    environment.reset(1)
    for name, (right, _) in SETTINGS.items():
        word = "off" if right else "on"
        reply = environment.step(read(f"Please turn {name.removesuffix(' inserted')} {word}."))
        assert reply == Reply((Message(role="user", content=f"I did it: {name} {word}."),))
    shown = environment.step(read("What does your phone show?"))
    assert isinstance(shown, Reply)
    assert "airplane mode on, mobile data off" in shown.messages[0].content


def test_a_copy_of_all_data_states_no_number() -> None:
    assert states("You get 45.", "45")
    assert not states("You get 145.", "45")
    assert not states("You get 45.5", "45")
    assert not states("45 " * 200, "45")


def test_a_mistake_in_a_call_is_a_reply(world: str) -> None:
    environment = WORLDS[world][1]()
    opening = environment.reset(0)
    for schema in opening.tools:
        reply = environment.step(read(render(schema["function"]["name"], {})))
        assert isinstance(reply, Reply)
        assert reply.tool_errors == 1
