"""Agent programs in an evaluation: which program plays which tasks, and what is refused."""

import pytest

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.session_environments import agent_programs, session_environments

AGENTS = {
    "helper": {"command": ["a"], "environment": "retail-mini"},
    "own": {"command": ["b"]},
}


def config(training: dict[str, float], **evaluation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "none"},
            "tasks": {"environments": training},
            "learner": {"versions": 1},
            "rollout": {"agents": AGENTS},
            "evaluation": {"every": 1, **evaluation},
        }
    )


def test_a_program_plays_the_split_of_its_environment() -> None:
    run = config({"helper": 1.0}, split="test")
    assert agent_programs(run)["helper.test"].environment == "retail-mini.test"
    assert agent_programs(run)["helper.test"].command == ("a",)
    assert session_environments(run) == {"retail-mini", "retail-mini.test"}


def test_without_a_split_a_program_plays_its_own_environment() -> None:
    run = config({"helper": 1.0, "own": 1.0})
    assert agent_programs(run) == run.rollout.agents
    assert session_environments(run) == {"retail-mini"}


def test_further_names_of_a_command_have_programs_too() -> None:
    assert agent_programs(config({"hop": 1.0}), "helper.test", "own.test", "hop.x").keys() == {
        "helper", "own", "helper.test"
    }  # fmt: skip


def test_a_split_of_a_program_without_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the program rollout\.agents\.own has no environment, so it has no splits"):
        config({"own": 1.0}, split="test")
    config({"own": 1.0}, split="test", every=0)
    config({"own": 1.0}, split="test", environments=["helper"])
