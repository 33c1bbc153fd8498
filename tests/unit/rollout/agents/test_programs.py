"""Real agent programs as processes, over the official OpenAI client: tokens, branches, rewards and failures."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from palimpsest.common.arrays import unpack_float32, unpack_int32
from palimpsest.common.branches import sequences
from palimpsest.common.config.agents import AgentConfig
from palimpsest.common.environments import hop
from palimpsest.common.messages import DropReason, Ending, TrajectoryDropped, TrajectoryFinished
from palimpsest.services.rollout.agents import runner
from palimpsest.services.rollout.agents.endpoints import serving
from palimpsest.services.rollout.agents.runner import AgentRunner
from palimpsest.services.rollout.engine.port import EngineFailed
from palimpsest.services.rollout.trajectory_sampler import Ended
from tests.processes.waiting import LIMIT_S, until
from tests.unit.rollout.sampling import SAMPLING, MessageEngine, NextMessage, Setting
from tests.unit.rollout.test_trajectory_sampler import assert_tokens_match_the_engine

EXAMPLE = Path(__file__).parents[4] / "examples" / "agents" / "tool_agent.py"
PROGRAMS = Path(__file__).with_name("programs.py")


async def play(
    setting: Setting, engine: MessageEngine, *command: str, environment: str = "", attempts: int = 1,
    time_limit_s: float | None = None,
) -> Ended:  # fmt: skip
    config = AgentConfig(command=(sys.executable, *command), environment=environment, time_limit_s=time_limit_s)
    sampler = setting.sampler(engine, attempts=attempts)
    agents = AgentRunner({"agent": config}, sampler.sessions)
    async with asyncio.timeout(LIMIT_S), sampler.sessions:
        with serving(agents):
            ended = await replace(sampler, agents=agents).sample(setting.group("agent", 5, SAMPLING), 2)
    assert sampler.live == []
    assert agents.open._open == {}
    return ended


async def test_a_program_solves_the_task_of_an_environment(setting: Setting) -> None:
    """The weights change inside its second message: each token keeps its version."""
    texts = [setting.dialogue.encode(text) for text in hop.solution(5)]
    versions = [[0] * len(texts[0]), [*[0] * (len(texts[1]) // 2), *[1] * len(texts[1])], [1] * len(texts[2])]
    engine = MessageEngine([NextMessage(t, versions=v[: len(t)]) for t, v in zip(texts, versions, strict=True)])
    ended = await play(setting, engine, str(EXAMPLE), environment="hop")
    assert isinstance(ended, TrajectoryFinished), ended
    assert_tokens_match_the_engine(ended, engine)
    assert [segment.version for segment in ended.segments] == [0, 0, 1, 1]
    assert (ended.reward, ended.success, ended.ending, ended.turns) == (1.0, True, Ending.TERMINATED, 3)
    assert (ended.environment, ended.environment_version, ended.branches) == ("agent", "1", ())


async def test_a_program_that_rewrites_its_past_has_branches_and_one_reward(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "END_S", 0.01)
    engine = setting.engine_of("3", "red", "5")
    ended = await play(setting, engine, str(PROGRAMS), "rewrites")
    assert isinstance(ended, TrajectoryFinished), ended
    main, branch = sequences(ended)
    assert (ended.reward, ended.turns, [one.number for one in ended.branches]) == (0.25, 3, [1])
    tokens = unpack_int32(branch.tokens).tolist()
    assert tokens == [*engine.prompts[2], *engine.answers[2].tokens]
    assert unpack_float32(branch.segments[0].behavior_logprobs).tolist() == list(engine.answers[2].logprobs)
    assert unpack_int32(main.tokens).tolist() == [*engine.prompts[1], *engine.answers[1].tokens]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("dies", "ended with code 1: .*it broke"),
        ("silent", "without a message of the model"),
        ("ends", "without a reward"),
    ],
)
async def test_a_program_that_dies_gives_no_reward(setting: Setting, what: str, reason: str) -> None:
    ended = await play(setting, setting.engine_of("3", "3"), str(PROGRAMS), what)
    assert isinstance(ended, TrajectoryDropped)
    assert ended.reason is DropReason.ENVIRONMENT_FAILED
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(ended.detail)


async def test_a_program_that_hangs_is_killed_with_its_children(setting: Setting, tmp_path: Path) -> None:
    child = tmp_path / "child"
    ended = await play(setting, setting.engine_of("3"), str(PROGRAMS), "hangs", str(child), time_limit_s=8.0)
    assert isinstance(ended, TrajectoryDropped)
    assert "did not end within 8 s" in ended.detail
    if child.exists():  # else the machine was too busy to start it within the limit
        until(lambda: has_ended(int(child.read_text())))


def has_ended(pid: int) -> bool:
    """Whether this process has ended, also if no process has waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_program_receives_no_secret(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    ended = await play(setting, setting.engine_of("3"), str(PROGRAMS), "secrets")
    assert isinstance(ended, TrajectoryFinished), ended
    assert ended.reward == 0.0


async def test_a_command_that_cannot_be_started_says_so(setting: Setting) -> None:
    sampler = setting.sampler(setting.engine_of(), attempts=1)
    agents = AgentRunner({"agent": AgentConfig(command=("no-such-program",))}, sampler.sessions)
    async with sampler.sessions:
        ended = await replace(sampler, agents=agents).sample(setting.group("agent", 5, SAMPLING), 2)
    assert isinstance(ended, TrajectoryDropped)
    assert "no-such-program cannot be started" in ended.detail


async def test_a_failed_engine_fails_the_attempt_and_the_next_one_starts_over(setting: Setting) -> None:
    first, *rest = (NextMessage(setting.dialogue.encode(text)) for text in ("3", "3", "3"))
    engine = MessageEngine([EngineFailed("lost"), first, *rest])
    ended = await play(setting, engine, str(PROGRAMS), "secrets", attempts=2)
    assert isinstance(ended, TrajectoryFinished), ended
    assert ended.attempt == 1
