"""The values of one version that the page and the report draw. Pure."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class VersionPoint(BaseModel):
    """One trained version. None: the version has no such value."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    version: int
    """The version that the training produced."""
    minutes: float
    """Running time of the learner, without breaks between starts."""
    settings: int
    """Number of changes of settings so far."""
    entropy: float | None
    """Mean over the trained tokens, nats."""
    grad_norm: float | None
    learning_rate: float | None
    length: float | None
    """Mean number of tokens of a trained trajectory."""
    cuts: int
    """Changes of version inside a turn."""
    reward: float
    """Mean over the trajectories."""


def point(line: Mapping[str, Any]) -> VersionPoint:
    """Return the point of a line of history.jsonl."""
    return VersionPoint(
        version=line["published"],
        minutes=round(line["seconds"] / 60, 4),
        settings=line.get("settings", 0),
        entropy=line.get("all", {}).get("entropy"),
        grad_norm=line.get("grad_norm"),
        learning_rate=line.get("learning_rate"),
        length=line.get("length"),
        cuts=line.get("cuts", 0),
        reward=line["reward"],
    )
