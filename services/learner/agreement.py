"""Refuses ranks that were started with different configurations: nodes of a cluster have their own files and variables.

Such ranks would compute different sums, or wait for each other without end.
"""

import socket
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from palimpsest import __version__
from palimpsest.common.config.differences import differences_at
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
    """Section or package -> value. All must be equal, but for OF_A_NODE."""


def refuse_disagreement(config: RunConfig, ranks: ProcessGroup) -> None:
    """Raise UserError on every rank if a rank has another configuration or other packages than rank 0. All ranks must
    call it."""
    values = config.model_dump(mode="json", include=set(SECTIONS)) | _packages()
    if message := disagreement(ranks.all_gather_object(ConfigOfRank(socket.gethostname(), values))):
        raise UserError(message)


def disagreement(starts: list[ConfigOfRank]) -> str | None:
    """Return the error text for the first rank that differs from rank 0; None if all agree. starts: by rank."""
    first = starts[0]
    for rank, start in enumerate(starts):
        found = [
            f"{name} is {own!r}, not {expected!r}"
            for section in sorted(first.values.keys() | start.values.keys())
            for name, expected, own in differences_at(section, first.values.get(section), start.values.get(section))
            if name not in OF_A_NODE
        ]
        if found:
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            return (
                f"rank {rank} of the learner (on {start.host}) was not started as rank 0 (on {first.host}): "
                f"{'; '.join(found[:SHOWN])}{more}. Start every node with the same run file, flags, variables and image"
            )
    return None


def _packages() -> dict[str, Any]:
    return {
        "version of palimpsest": __version__,
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
    }
