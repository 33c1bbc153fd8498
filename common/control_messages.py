"""Messages of topic `control` about changes that people request, and about evaluations."""

from typing import Any

from msgspec import Struct

from palimpsest.common.versions import Version


class ControlChanged(Struct, frozen=True, forbid_unknown_fields=True, tag="control_changed/1"):
    """The learner accepted a change and is about to apply it. Topic `control`."""

    run: str
    writer: int
    """Epoch of the learner that applies it."""
    number: int
    """Number of the record among the run's changes, from 1."""
    change: str
    """Id of the change."""
    who: str
    """Name of the token that requested it; `local` where the learner needs no token."""
    role: str
    address: str
    """Address of the client."""
    what: str
    """`settings`, or the name of an action."""
    before: dict[str, Any]
    """Former values of the keys that change."""
    after: dict[str, Any]
    """New values by key, or the arguments of the action."""
    generation: int
    """Number of changes of settings in the run, this one included. Each line of history.jsonl has it."""
    version: Version
    """Newest version when the change was applied."""
    next_group: int
    """Index of the next group to offer when the change was applied."""
    asked_at: float
    """Unix seconds, for displays only."""
    applies_from: str
    """When it takes effect, in words."""

    def follows(self, number: int, writer: int) -> bool:
        """Whether the change took effect after the one with this number, of the learner of this epoch.

        A repeated record does not, nor does that of a learner that was replaced when it wrote.
        """
        return self.number > number and self.writer >= writer


class EvaluationStarted(Struct, frozen=True, forbid_unknown_fields=True, tag="evaluation_started/1"):
    """An evaluation of a version begins: workers load no later version until it ends. Topic `control`."""

    run: str
    version: Version
    writer: int
    """Epoch of the learner that evaluates."""


class EvaluationEnded(Struct, frozen=True, forbid_unknown_fields=True, tag="evaluation_ended/1"):
    """The evaluation of a version ended: workers load the newest version again. Topic `control`."""

    run: str
    version: Version
    writer: int
    """See EvaluationStarted."""
