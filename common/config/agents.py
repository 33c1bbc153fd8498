"""The tables of `rollout.agents`. docs/configuration.md is generated from the docstrings under the keys."""

from typing import Annotated

from pydantic import AfterValidator, Field

from palimpsest.common.config.section import Positive, PositiveFloat, Section


class AgentConfig(Section):
    """A program that drives the model itself (docs/agents.md)."""

    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Program and arguments, started once for each session."""
    environment: str = ""
    """Environment that gives the task and the score. If empty, the program reads the seed of its task and posts the
    reward."""
    variables: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of environment variables that the program receives besides the usual ones and those of its session."""
    max_calls: Positive = 64
    """Maximum number of model messages in a session, over all of its branches."""
    max_sampled_tokens: Positive = 65536
    """Maximum number of sampled tokens in a session, over all of its branches."""
    time_limit_s: PositiveFloat | None = None
    """Time limit of a session, in seconds. After it the program is killed and the reward is unknown. None:
    tasks.time_limit_s."""
    max_processes: Positive = 16
    """Maximum number of concurrent programs of one worker. Further sessions wait."""


def _have_environments(agents: dict[str, AgentConfig]) -> dict[str, AgentConfig]:
    for name, agent in agents.items():
        if agent.environment in agents:
            raise ValueError(
                f"rollout.agents.{name}.environment is {agent.environment!r}, which is a program itself; name an "
                f"environment, or leave it out"
            )
    return agents


Agents = Annotated[
    dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")], AgentConfig], AfterValidator(_have_environments)
]
"""Name -> program."""
