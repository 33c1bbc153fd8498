"""Maps names to environments. A name from a request is used only for this lookup.

The built-in families and worlds are pure, fast and trusted, so a gateway and a rollout worker step them in their own
process.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from palimpsest.common.environments import add, hop, lookup
from palimpsest.common.environments.authoring.function_environment import FunctionEnvironment
from palimpsest.common.environments.port import Environment, TaskFamily
from palimpsest.common.environments.worlds import airline, retail, telecom
from palimpsest.common.environments.worlds.case import WorldDefinition
from palimpsest.common.sessions.hosts import EnvironmentHost, InProcess

FAMILIES: Mapping[str, TaskFamily] = {"lookup": lookup, "hop": hop, "add": add}
"""The built-in task families, with the functions that prepare a model for each."""

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
    """One environment."""

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


async def _in_process(made: Callable[[], Environment]) -> EnvironmentHost:
    return InProcess(made())


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
