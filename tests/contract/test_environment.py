"""Contract of every environment: built-in ones run in this process, those of reasoning-gym in child processes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from palimpsest.common.environments.reasoning_gym_tasks import DATASETS, MAX_CALLS, MAX_TURNS
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.sessions.hosts import EnvironmentHost
from palimpsest.common.sessions.registry import FAMILIES, Registry, built_in
from palimpsest.env import Opening, Outcome, Score, Turn
from palimpsest.services.env_gateway.isolated import reasoning_gym
from palimpsest.services.env_gateway.processes.pool import Pool

GENERATED = tuple(
    f"reasoning_gym.{dataset}"
    for dataset in ("basic_arithmetic", "chain_sum", "codeio", "gcd", "maze", "sentence_reordering", "word_sorting")
)
OFFERED = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.servers) for name in GENERATED)]
SEEDS = (0, 1, 7, 2**40, -5)

POLICIES: dict[str, list[str]] = {
    "says nothing": [""],
    "guesses": ["4"],
    "calls first": [render("lookup", {"key": "amber"}), render("calculator", {"expression": "1 + 2"}), "3"],
    "calls at once": [render("calculator", {"expression": "2 * 3"}) * 3, "6"],
    "calls badly": ["<tool_call>\n{\n</tool_call>", render("nothing", {}), "<tool_call>", "x"],
    "never answers": [render("calculator", {"expression": "1"})] * MAX_TURNS,
}

Transcript = tuple[Opening, str, list[Outcome]]


pytestmark = pytest.mark.asyncio(loop_scope="module")  # the pool's loop


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registry() -> AsyncIterator[Registry]:
    pool = Pool(limit=8, wait_s=60.0, call_limit_s=60.0, modules=("reasoning_gym",))
    yield {**built_in(), **reasoning_gym(pool)}
    await pool.close()


@pytest_asyncio.fixture(loop_scope="module")
async def opened(registry: Registry) -> AsyncIterator[Callable[[str], Any]]:
    worlds: list[EnvironmentHost] = []

    async def opened(name: str) -> EnvironmentHost:
        worlds.append(await registry[name].open())
        return worlds[-1]

    yield opened
    for world in worlds:
        world.close()


async def play(world: EnvironmentHost, seed: int, texts: list[str]) -> Transcript:
    opening, state_hash = await world.reset(seed)
    outcomes: list[Outcome] = []
    for text in texts:
        outcomes.append(await world.step(read(text)))
        if isinstance(outcomes[-1], Score):
            return opening, state_hash, outcomes
    outcomes.append(await world.finalize())
    return opening, state_hash, outcomes


@pytest.mark.parametrize("name", OFFERED)
async def test_a_seed_gives_the_same_transcript_every_time(opened: Any, name: str) -> None:
    for policy in ("calls first", "calls badly"):
        first = await play(await opened(name), 7, POLICIES[policy])
        assert await play(await opened(name), 7, POLICIES[policy]) == first


@pytest.mark.parametrize("name", OFFERED)
async def test_another_session_does_not_change_a_transcript(opened: Any, name: str) -> None:
    texts = POLICIES["calls first"]
    alone = await play(await opened(name), 7, texts)
    one, other = await opened(name), await opened(name)
    opening, state_hash = await one.reset(7)
    await other.reset(8)
    outcomes: list[Outcome] = []
    for text in texts:
        await other.step(read(texts[0]))
        outcomes.append(await one.step(read(text)))
        if isinstance(outcomes[-1], Score):
            break
    assert (opening, state_hash, outcomes) == alone


@pytest.mark.parametrize("name", OFFERED)
async def test_concurrent_sessions_are_independent(opened: Any, name: str) -> None:
    texts = POLICIES["calls first"]
    alone = [await play(await opened(name), seed, texts) for seed in SEEDS[:2]]
    worlds = [await opened(name) for _ in range(2)]
    together = await asyncio.gather(*(play(world, seed, texts) for world, seed in zip(worlds, SEEDS[:2], strict=True)))
    assert list(together) == alone


@pytest.mark.parametrize("name", OFFERED)
async def test_different_seeds_give_different_tasks(opened: Any, name: str) -> None:
    hashes, openings = set(), set()
    for seed in SEEDS:
        world = await opened(name)
        opening, state_hash = await world.reset(seed)
        world.close()
        hashes.add(state_hash)
        openings.add(opening.messages)
    assert len(hashes) == len(SEEDS)
    assert len(openings) >= 2


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("policy", POLICIES)
async def test_rewards_are_between_0_and_1_and_fixed_policies_solve_no_family(
    opened: Any, name: str, policy: str
) -> None:
    for seed in SEEDS[:2]:
        world = await opened(name)
        _, _, outcomes = await play(world, seed, POLICIES[policy])
        world.close()
        score = outcomes[-1]
        assert isinstance(score, Score)
        assert 0.0 <= score.reward <= 1.0
        assert all(0.0 <= part <= 1.0 for part in score.parts.values())
        assert not (name in FAMILIES and score.success)


@pytest.mark.parametrize("name", FAMILIES)
async def test_the_solution_of_a_family_gets_reward_1(opened: Any, name: str) -> None:
    for seed in SEEDS:
        _, _, outcomes = await play(await opened(name), seed, FAMILIES[name].solution(seed))
        assert outcomes[-1] == Score(1.0, True, outcomes[-1].parts)  # type: ignore[union-attr]


@pytest.mark.servers
@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("form", ["{}", " {}\n", "It must be <answer>{}</answer>."])
async def test_the_answer_of_a_generated_task_gets_reward_1(opened: Any, name: str, form: str) -> None:
    import reasoning_gym

    dataset = name.removeprefix("reasoning_gym.")
    answer = reasoning_gym.create_dataset(dataset, seed=7, size=1)[0]["answer"]
    world = await opened(name)
    _, _, outcomes = await play(world, 7, [render("calculator", {"expression": "1"}), form.format(answer)])
    assert outcomes[-1] == Score(1.0, True, {"answer": 1.0})


@pytest.mark.parametrize("name", OFFERED)
async def test_a_malformed_call_does_not_end_the_session(opened: Any, name: str) -> None:
    world = await opened(name)
    await world.reset(7)
    assert not isinstance(await world.step(read("<tool_call>\n4\n</tool_call>")), Score)


@pytest.mark.parametrize("name", OFFERED)
async def test_the_opening_has_one_user_message_and_one_tool(opened: Any, name: str) -> None:
    opening, _ = await (await opened(name)).reset(7)
    assert [message.role for message in opening.messages] == ["user"]
    (schema,) = opening.tools
    assert schema["type"] == "function"
    assert schema["function"]["parameters"]["required"]


@pytest.mark.servers
async def test_the_calculator_of_a_generated_task_can_be_used_eight_times(opened: Any) -> None:
    world = await opened("reasoning_gym.chain_sum")
    await world.reset(7)
    call = read(render("calculator", {"expression": "1 + 2"}))
    replies = [(await world.step(call)).messages[0].content for _ in range(MAX_TURNS - 1)]
    assert replies == ["3"] * MAX_CALLS + ["the calculator was used 8 times: answer now"]
    assert await world.step(Turn("")) == Score(0.0, False, {"answer": 0.0})


@pytest.mark.servers
async def test_every_dataset_but_the_composite_is_available() -> None:
    import reasoning_gym  # noqa: F401 (the import registers the datasets)
    from reasoning_gym.factory import DATASETS as REGISTERED

    assert {*DATASETS, "composite"} == set(REGISTERED)
