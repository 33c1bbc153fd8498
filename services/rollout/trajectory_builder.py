"""Builds one token array and its segments from prompt, model messages and tool output. Pure.

Tokens are only appended, so the learner scores exactly the prefix that the engine used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.messages import GroupOffered
from palimpsest.common.trajectory import Segment
from palimpsest.services.rollout.engine.port import SampledTokens


class Contradiction(ValueError):
    """The engine's log-probs or spans do not match its sampled tokens."""


class TrajectoryBuilder:
    """A trajectory under construction.

    Invariant: every sampled token is covered by exactly one segment, no other token is.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._segments: list[Segment] = []
        self._turns = 0

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: the prefix of the next message."""
        return self._tokens

    @property
    def turns(self) -> int:
        """Number of model messages so far."""
        return self._turns

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments so far, in order."""
        return tuple(self._segments)

    def pack(self) -> bytes:
        """Return the tokens in their wire format."""
        return pack_int32(self._tokens)

    def add_sampled(self, sampled: SampledTokens) -> None:
        """Append a model message. Raises Contradiction and changes nothing if its parts do not match."""
        if len(sampled.logprobs) != len(sampled.tokens):
            raise Contradiction(
                f"the engine returned {len(sampled.tokens)} tokens with {len(sampled.logprobs)} log-probs"
            )
        covered = 0
        for span in sampled.spans:
            if span.start != covered or span.stop <= span.start or span.version < 0:
                raise Contradiction(f"span [{span.start}, {span.stop}) of version {span.version} after token {covered}")
            covered = span.stop
        if covered != len(sampled.tokens):
            raise Contradiction(f"spans cover {covered} of {len(sampled.tokens)} sampled tokens")
        base = len(self._tokens)
        if sampled.routes is not None and len(sampled.routes) != base + len(sampled.tokens) - 1:
            raise Contradiction(
                f"the engine returned experts of {len(sampled.routes)} positions before {len(sampled.tokens)} tokens "
                f"after {base}"
            )
        self._tokens.extend(sampled.tokens)
        for span in sampled.spans:
            start, stop = self._segments[-1].stop - 1 if self._segments else 0, base + span.stop - 1
            self._segments.append(
                Segment(
                    base + span.start,
                    base + span.stop,
                    span.version,
                    pack_float32(list(sampled.logprobs[span.start : span.stop])),
                    b"" if sampled.routes is None else sampled.routes[start:stop].tobytes(),
                )
            )
        self._turns += 1

    def with_partial(self, partial: SampledTokens | None) -> "TrajectoryBuilder":
        """Return a copy that includes the tokens sampled so far of the message in flight. Raises Contradiction."""
        so_far = TrajectoryBuilder(self._tokens)
        so_far._segments, so_far._turns = list(self._segments), self._turns
        if partial is not None:
            so_far.add_sampled(partial)
        return so_far

    def until_last_sampled(self) -> "TrajectoryBuilder":
        """Return a copy that ends at the last sampled token."""
        end = self._segments[-1].stop if self._segments else len(self._tokens)
        trimmed = TrajectoryBuilder(self._tokens[:end])
        trimmed._segments, trimmed._turns = list(self._segments), self._turns
        return trimmed

    def add_environment(self, tokens: Sequence[int]) -> None:
        """Append the tokens of an environment message."""
        self._tokens.extend(tokens)


@dataclass(slots=True, eq=False)
class InFlightTrajectory:
    """A trajectory in flight, from the start of its session until its record is in the outbox."""

    group: GroupOffered
    trajectory: str
    attempt: int
    assembly: TrajectoryBuilder
    """The trajectory without the message in flight."""
    request: str | None = None
    """The engine's request id of the message in flight."""
    flushed: int = 0
    """Number of leading tokens that were flushed at a cut."""
