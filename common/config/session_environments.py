"""The environments that sessions of a run need. Pure."""

from palimpsest.common.config.schema import RunConfig


def session_environments(config: RunConfig) -> frozenset[str]:
    """Return the environments that the run trains or evaluates on, and in place of agents those of the agents."""
    agents = config.rollout.agents
    named = (*config.tasks.environments, *config.evaluated_environments)
    return frozenset(filter(None, (agents[name].environment if name in agents else name for name in named)))
