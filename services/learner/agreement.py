"""Refuses ranks that were started with different configurations: nodes of a cluster have their own files and variables.

Such ranks would compute different sums, or wait for each other without end.
"""

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from palimpsest import __version__
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.distributed import ProcessGroup

SECTIONS = ("run", "model", "sampling", "tasks", "learner", "snapshot_store")
OF_A_NODE = ("run.folder", "learner.host", "learner.port", "learner.threads", "snapshot_store.folder")
"""Keys that may differ: addresses and paths of a machine."""
SHOWN = 5
"""Number of differences that the error names."""


@dataclass(frozen=True, slots=True)
class ConfigOfRank:
    """How a rank was started."""

    host: str
    values: dict[str, Any]
    """Key -> value of everything that must be equal."""


def refuse_disagreement(config: RunConfig, ranks: ProcessGroup) -> None:
    """Raise UserError on every rank if a rank has another configuration or other packages than rank 0. All ranks must
    call it."""
    keys = _flat(config.model_dump(mode="json", include=set(SECTIONS)))
    values = {name: value for name, value in keys if name not in OF_A_NODE} | _packages()
    if message := disagreement(ranks.all_gather_object(ConfigOfRank(socket.gethostname(), values))):
        raise UserError(message)


def disagreement(starts: list[ConfigOfRank]) -> str | None:
    """Return the error text for the first rank that differs from rank 0; None if all agree. starts: by rank."""
    first = starts[0]
    for rank, start in enumerate(starts):
        names = sorted(name for name in first.values.keys() | start.values.keys() if _differ(name, first, start))
        if names:
            parts = [f"{name} is {start.values.get(name)!r}, not {first.values.get(name)!r}" for name in names[:SHOWN]]
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            return (
                f"rank {rank} of the learner (on {start.host}) was not started as rank 0 (on {first.host}): "
                f"{'; '.join(parts)}{more}. Start every node with the same run file, flags, variables and image"
            )
    return None


def _differ(name: str, first: ConfigOfRank, other: ConfigOfRank) -> bool:
    return name not in other.values or name not in first.values or first.values[name] != other.values[name]


def _packages() -> dict[str, Any]:
    return {"version of palimpsest": __version__, "version of torch": torch.__version__}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key -> value of nested sections."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
