"""Environments whose sessions each run in a process of their own: those of reasoning-gym, and plugins."""

import importlib.util
from functools import partial

from palimpsest.common.environments.reasoning_gym_tasks import DATASETS, ReasoningGymTask
from palimpsest.common.sessions.registry import Entry
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

REASONING_GYM = "reasoning_gym."


def reasoning_gym(pool: Pool) -> dict[str, Entry]:
    """Return every dataset of reasoning-gym; empty if it is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return {}
    path = f"{ReasoningGymTask.__module__}:{ReasoningGymTask.__name__}"
    return {
        f"{REASONING_GYM}{dataset}": isolated(
            pool,
            f"{REASONING_GYM}{dataset}",
            EnvironmentSpec(path=path, arguments=(dataset,)),
            version=ReasoningGymTask.version,
            description=f"reasoning-gym's {dataset}, with a calculator",
        )
        for dataset in DATASETS
    }


def isolated(pool: Pool, name: str, blueprint: EnvironmentSpec, *, version: str, description: str) -> Entry:
    """Return an environment whose sessions each run in a child process."""
    return Entry(name, version, description, True, partial(InChild.open, pool, blueprint))
