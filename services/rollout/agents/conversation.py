"""The rule by which a request of an agent program continues its session or begins a branch. Pure.

An agent sends its whole conversation with every request. A sequence is a token array that only grows; a mark is the end
of a model message in it. A request continues a sequence if its messages begin with all messages up to the last mark,
the model's as they were delivered, and have the same tools. Any other request begins a branch: a sequence of its own,
whose prefix ends at the last mark that the request agrees with. Tokens of a model message are therefore never made from
text again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.wire import Message
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call in a message."""

    name: str
    arguments: str
    """JSON with sorted keys, so that a program may format it differently."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    calls: tuple[Call, ...] = ()

    def agrees(self, other: "ChatMessage") -> bool:
        """Whether both are the same message. White space around the text of a model message does not count."""
        if self.role != other.role or self.calls != other.calls:
            return False
        if self.role == "assistant":
            return self.content.strip() == other.content.strip()
        return self.content == other.content

    def plain(self) -> Message:
        """Return the message in the form of chat templates; tool calls become text."""
        texts = [self.content] if self.content else []
        texts += [render(call.name, json.loads(call.arguments)) for call in self.calls]
        return Message(role=self.role, content="\n".join(texts))


def call(name: str, arguments: dict[str, Any]) -> Call:
    """Return a call in its compared form."""
    return Call(name, json.dumps(arguments, sort_keys=True, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a model message in a sequence."""

    messages: int
    """Number of messages up to here, the model's included."""
    tokens: int
    """Number of tokens up to here."""
    ended_by: int | None
    """The stop token of the model message; None if a limit truncated it."""


@dataclass(eq=False, slots=True)
class TokenSequence:
    """One token sequence of a session."""

    number: int
    live: InFlightTrajectory
    tools: str
    """The tools as JSON."""
    history: list[ChatMessage]
    marks: list[Mark] = field(default_factory=list)
    busy: bool = False
    """Whether a model message is being sampled."""

    @property
    def is_growable(self) -> bool:
        """Whether the sequence ends at its last mark and no message is in flight."""
        return not self.busy and bool(self.marks) and self.marks[-1].tokens == len(self.live.assembly.tokens)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request continues."""

    sequence: TokenSequence
    mark: Mark

    @property
    def continues(self) -> bool:
        """Whether the request continues the sequence; otherwise it begins a branch at the mark."""
        return self.sequence.is_growable and self.sequence.marks[-1] == self.mark


def find(sequences: Sequence[TokenSequence], tools: str, messages: Sequence[ChatMessage]) -> Place | None:
    """Return the last mark that the request agrees with; one at the end of a sequence before others. None: none."""
    best: Place | None = None
    for sequence in sequences:
        if sequence.tools != tools:
            continue
        common = 0
        for ours, theirs in zip(sequence.history, messages, strict=False):
            if not ours.agrees(theirs):
                break
            common += 1
        usable = [mark for mark in sequence.marks if mark.messages <= common and mark.messages < len(messages)]
        if not usable:
            continue
        place = Place(sequence, usable[-1])
        if best is None or (place.mark.messages, place.continues) > (best.mark.messages, best.continues):
            best = place
    return best
