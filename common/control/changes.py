"""A change that a person requests of a running service, and its states. Pure."""

from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct


class ChangeState(StrEnum):
    """State of a change."""

    REQUESTED = "requested"
    """The service has it and has not reached a point at which it may apply it."""
    APPLIED = "applied"
    """It has taken effect. `version` says since which version."""
    REFUSED = "refused"
    """The service cannot apply it. `code` and `message` say why."""
    SUPERSEDED = "superseded"
    """A later change set the same keys before this one took effect."""
    LOST = "lost"
    """The service ended or was replaced before it took effect."""


class Caller(Struct, frozen=True):
    """Who requested a change."""

    name: str
    """Name of the token; `local` where the service needs no token."""
    role: str
    address: str
    """Address of the client."""


class Change(Struct, frozen=True, kw_only=True):
    """A requested change."""

    id: str
    kind: str
    """`settings`, or the name of an action."""
    what: dict[str, Any]
    """The new values by key, or the arguments of the action."""
    caller: Caller
    requested_at: float
    """Unix seconds, for displays only."""
    applies_from: str
    """When the change takes effect, in words."""
    state: ChangeState = ChangeState.REQUESTED
    version: int | None = None
    """Version of the service when the change was applied."""
    code: str = ""
    """Why the change was refused or lost, for programs."""
    message: str = ""
    """The same for people."""
    before: dict[str, Any] = {}
    """Former values of the keys of `what`."""
    result: dict[str, Any] = {}
    """What an action produced."""

    @property
    def is_finished(self) -> bool:
        """Whether the state is final."""
        return self.state is not ChangeState.REQUESTED

    def covers(self, other: "Change") -> bool:
        """Whether both change settings, and this one sets every key of the other."""
        return self.kind == other.kind == "settings" and other.what.keys() <= self.what.keys()


def as_json(change: Change) -> dict[str, Any]:
    """Return the change as the body of a reply; its id is in `change`."""
    fields: dict[str, Any] = msgspec.to_builtins(change)
    return {"change": fields.pop("id"), **fields}
