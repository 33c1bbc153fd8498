"""The environments that sessions of a run need, and the agent programs of a run. Pure."""

from palimpsest.common.config.agents import AgentConfig
from palimpsest.common.config.schema import RunConfig


def session_environments(config: RunConfig) -> frozenset[str]:
    """Return the environments that the run trains or evaluates on, and in place of agents those of the agents."""
    agents = agent_programs(config)
    named = (*config.tasks.environments, *config.evaluated_environments)
    return frozenset(filter(None, (agents[name].environment if name in agents else name for name in named)))


def agent_programs(config: RunConfig, *further: str) -> dict[str, AgentConfig]:
    """Return the agents of the run by the name of their tasks.

    If the evaluation names a split, the agent NAME also plays NAME.SPLIT: the tasks ENVIRONMENT.SPLIT. further: names
    of tasks besides those of the run.
    """
    agents = dict(config.rollout.agents)
    for name in (*config.evaluated_environments, *further):
        base, _, split = name.rpartition(".")
        if name not in agents and base in agents and agents[base].environment:
            agents[name] = agents[base].model_copy(update={"environment": f"{agents[base].environment}.{split}"})
    return agents
