"""Keys of the evaluation on tasks that the run does not train on."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from palimpsest.common.config.agents import AgentConfig
from palimpsest.common.config.section import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, PositiveFloat, Section


class EvaluationConfig(Section):
    """Evaluation of the policy on tasks that it is not trained on (docs/evaluation.md)."""

    every: Annotated[int, Field(ge=0)] = 0
    """Number of trained versions between two evaluations. The starting model and the last version are evaluated too.
    0: no evaluation."""
    environments: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Environments to evaluate on. Default: those of tasks.environments."""
    split: Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,32}$")] = ""
    """Split of the environments: `test` evaluates on NAME.test in place of NAME. If empty, the environment itself is
    used, with task seeds from 2^31 on, which the training never draws."""
    tasks: Annotated[int, Field(ge=1, le=10000)] = 32
    """Number of tasks of each environment."""
    samples: Annotated[int, Field(ge=1, le=1000)] = 4
    """Trajectories for each task: the k of avg@k and pass@k."""
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)] | None = None
    """Sampling temperature, 0.01 to 100. Default: sampling.temperature."""
    time_limit_s: PositiveFloat | None = None
    """Time limit of an evaluation, in seconds. Trajectories that arrive later do not count. Default:
    tasks.time_limit_s."""

    def names(self, training: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the environments to evaluate on. training: those of tasks.environments."""
        return tuple(f"{name}.{self.split}" if self.split else name for name in self.environments or training)

    def check_agents(self, training: tuple[str, ...], agents: Mapping[str, AgentConfig]) -> None:
        """Check that the agents to evaluate have the split. training: see `names`. Raises ValueError."""
        for name in self.environments or training:
            if self.every and self.split and name in agents and not agents[name].environment:
                raise ValueError(
                    f"evaluation.split is {self.split!r}, but the program rollout.agents.{name} has no environment, so "
                    f"it has no splits: remove evaluation.split, or name others in evaluation.environments"
                )
