"""From prompts, model messages and tool output to one token array and its segments. Pure.

Tokens are only ever appended: what the engine saw as prefix is what the learner will score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.messages import GroupOffered
from palimpsest.common.trajectory import Segment
from palimpsest.services.rollout.engine.port import SampledTokens


class Contradiction(ValueError):
    """The engine's spans do not cover what it sampled."""


class TrajectoryBuilder:
    """A trajectory as it grows.

    Invariant: every sampled token is covered by exactly one segment, no other token is.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._segments: list[Segment] = []
        self._turns = 0

    @property
    def tokens(self) -> list[int]:
        """Everything so far: the prefix of the next message."""
        return self._tokens

    @property
    def turns(self) -> int:
        """Model messages so far."""
        return self._turns

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Who sampled what."""
        return tuple(self._segments)

    def pack(self) -> bytes:
        """The tokens for the wire."""
        return pack_int32(self._tokens)

    def add_sampled(self, sampled: SampledTokens) -> None:
        """Append a model message. Raises Contradiction, leaving everything as it was."""
        if len(sampled.logprobs) != len(sampled.tokens):
            raise Contradiction(f"{len(sampled.tokens)} tokens were sampled with {len(sampled.logprobs)} log-probs")
        covered = 0
        for span in sampled.spans:
            if span.start != covered or span.stop <= span.start or span.version < 0:
                raise Contradiction(f"span [{span.start}, {span.stop}) of version {span.version} after token {covered}")
            covered = span.stop
        if covered != len(sampled.tokens):
            raise Contradiction(f"spans cover {covered} of {len(sampled.tokens)} sampled tokens")
        base = len(self._tokens)
        self._tokens.extend(sampled.tokens)
        self._segments.extend(
            Segment(
                base + span.start,
                base + span.stop,
                span.version,
                pack_float32(list(sampled.logprobs[span.start : span.stop])),
            )
            for span in sampled.spans
        )
        self._turns += 1

    def with_partial(self, partial: SampledTokens | None) -> "TrajectoryBuilder":
        """A trajectory of its own: this one and the message under way, as far as it has come. Raises Contradiction."""
        so_far = TrajectoryBuilder(self._tokens)
        so_far._segments, so_far._turns = list(self._segments), self._turns
        if partial is not None:
            so_far.add_sampled(partial)
        return so_far

    def add_environment(self, tokens: Sequence[int]) -> None:
        """Append what the environment said."""
        self._tokens.extend(tokens)


@dataclass(slots=True, eq=False)
class InFlightTrajectory:
    """A trajectory under way, from its session's start until its record is put into the outbox."""

    group: GroupOffered
    trajectory: str
    attempt: int
    assembly: TrajectoryBuilder
    """Everything but the message under way."""
    request: str | None = None
    """The message under way, as the engine knows it."""
    flushed: int = 0
    """Tokens, from the first on, that were sent ahead at a cut."""
