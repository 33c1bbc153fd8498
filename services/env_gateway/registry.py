"""Maps names to environments. A name from a request is used only for this lookup."""

import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from palimpsest.services.env_gateway.authoring.function_environment import FunctionEnvironment
from palimpsest.services.env_gateway.environments import add, hop, lookup
from palimpsest.services.env_gateway.environments.port import Environment, TaskFamily
from palimpsest.services.env_gateway.environments.reasoning_gym_tasks import DATASETS, ReasoningGymTask
from palimpsest.services.env_gateway.environments.worlds import airline, retail, telecom
from palimpsest.services.env_gateway.environments.worlds.case import WorldDefinition
from palimpsest.services.env_gateway.hosts import EnvironmentHost, InProcess
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

FAMILIES: Mapping[str, TaskFamily] = {"lookup": lookup, "hop": hop, "add": add}
"""The built-in task families, with the functions that prepare a model for each."""

REASONING_GYM = "reasoning_gym."
CLASSES: Mapping[str, type[Environment]] = {"lookup": lookup.Lookup, "hop": hop.Hop, "add": add.Add}
"""The same families as environments."""
WORLDS: Mapping[str, tuple[WorldDefinition, type[FunctionEnvironment]]] = {
    "retail-mini": (retail.WORLD, retail.RetailMini),
    "airline-mini": (airline.WORLD, airline.AirlineMini),
    "telecom-mini": (telecom.WORLD, telecom.TelecomMini),
}
"""The customer-service worlds. NAME offers the split `train`, NAME.test the split `test`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One environment of the gateway."""

    name: str
    version: str
    description: str
    isolated: bool
    """Whether each session has its own process."""
    open: Callable[[], Awaitable[EnvironmentHost]]
    """Opens a host for a new session. Raises AtCapacity, EnvironmentFailed."""


Registry = Mapping[str, Entry]


def built_in() -> dict[str, Entry]:
    """Return the built-in families and worlds."""
    families = {
        name: Entry(name, made.version, _first_line(FAMILIES[name].__doc__), False, partial(_in_process, made))
        for name, made in CLASSES.items()
    }
    worlds = [
        Entry(
            name if split == made.splits[0] else f"{name}.{split}",
            made.version,
            f"{_first_line(made.__doc__)} ({split})",
            False,
            partial(_in_process, partial(made, split)),
        )
        for name, (_, made) in WORLDS.items()
        for split in made.splits
    ]
    return families | {entry.name: entry for entry in worlds}


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


async def _in_process(made: Callable[[], Environment]) -> EnvironmentHost:
    return InProcess(made())


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
