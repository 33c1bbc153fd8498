"""Names and what they stand for. A name from outside is looked up here and goes nowhere else."""

import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from palimpsest.services.env_gateway.environments import add, hop, lookup
from palimpsest.services.env_gateway.environments.port import Environment, TaskFamily
from palimpsest.services.env_gateway.environments.reasoning_gym_tasks import DATASETS, ReasoningGymTask
from palimpsest.services.env_gateway.hosts import EnvironmentHost, InProcess
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

FAMILIES: Mapping[str, TaskFamily] = {"lookup": lookup, "hop": hop, "add": add}
"""The built-in families, with what is needed to prepare a model for each."""

REASONING_GYM = "reasoning_gym."
CLASSES: Mapping[str, type[Environment]] = {"lookup": lookup.Lookup, "hop": hop.Hop, "add": add.Add}
"""The same families as environments."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One environment on offer."""

    name: str
    version: str
    description: str
    isolated: bool
    """Whether each session has a process of its own."""
    open: Callable[[], Awaitable[EnvironmentHost]]
    """A world for a new session. Raises AtCapacity, EnvironmentFailed."""


Registry = Mapping[str, Entry]


def built_in() -> dict[str, Entry]:
    """The families that come with Palimpsest."""
    return {
        name: Entry(name, made.version, _first_line(FAMILIES[name].__doc__), False, partial(_in_process, made))
        for name, made in CLASSES.items()
    }


def reasoning_gym(pool: Pool) -> dict[str, Entry]:
    """Every dataset, if reasoning-gym is installed."""
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
    """An environment whose sessions have a child each."""
    return Entry(name, version, description, True, partial(InChild.open, pool, blueprint))


async def _in_process(made: Callable[[], Environment]) -> EnvironmentHost:
    return InProcess(made())


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
