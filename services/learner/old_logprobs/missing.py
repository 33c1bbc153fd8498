"""The policy for tokens without an old log-prob (`learner.proximal.missing`). Every such token is counted and logged.

fail                          end the run with an error
drop                          leave the tokens out of the loss
surrogate:bypass              use the behavior log-probs
surrogate:current_recompute   use the log-probs of the weights before the version's first optimizer step
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.logs import logger
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.proximal.types import Exact, Patched

Holes = list[NDArray[np.bool_]]
"""For each micro-batch [rows, tokens] bool: trainable tokens without an old log-prob."""
MOST_NAMED = 5
SURROGATE = "surrogate:"


class MissingReason(StrEnum):
    """Why an old log-prob is missing."""

    VERSION_GONE = "version_gone"
    """The version's weights are not in the store."""
    NOT_SCORED = "not_scored"
    """No replica scored the token in time."""
    TOO_LATE = "too_late"
    """The token arrived after its version's weights had changed."""


class MissingCounter:
    """Counts tokens without an old log-prob since the process started. All counts are 0 in normal operation."""

    def __init__(self) -> None:
        self.tokens: Counter[tuple[str, str]] = Counter()
        """(why, policy) -> tokens."""
        self._taken: Counter[tuple[str, str]] = Counter()

    def add(self, why: MissingReason, policy: MissingPolicy, tokens: int) -> None:
        """Count tokens that `policy` was applied to."""
        self.tokens[why.value, policy] += tokens

    def restore(self, tokens: Counter[tuple[str, str]]) -> None:
        """Take over the counts of an earlier time: the passes after it are repeated."""
        self.tokens = tokens.copy()

    def take(self) -> dict[tuple[str, str], int]:
        """Return the counts since the last call."""
        new = self.tokens - self._taken
        self._taken = self.tokens.copy()
        return dict(new)


def complete(
    scores: BatchScores,
    batches: Sequence[PaddedBatch],
    now: Version,
    model: torch.nn.Module,
    *,
    policy: MissingPolicy,
    why: MissingReason,
    misses: MissingCounter,
) -> Exact | Patched:
    """Score the tokens of `now` with the model, apply `policy` to those of other versions that still lack a value, and
    return the proximal log-probs.

    A row with both kinds of tokens has one pass. Raises UserError if a value is missing and the policy is `fail`.
    """
    own = scores.of(now)
    holes = [unknown & ~mine for unknown, mine in zip(scores.unknown, own, strict=True)]
    recompute = policy == "surrogate:current_recompute"
    scores.score_resident(model, [unknown.copy() for unknown in scores.unknown] if recompute else own)
    # the policy comes after the passes: if they fail on a row, the batch is scored again without it
    return apply_missing_policy(scores, holes, batches, policy=policy, why=why, misses=misses)


def apply_missing_policy(
    scores: BatchScores,
    holes: Holes,
    batches: Sequence[PaddedBatch],
    *,
    policy: MissingPolicy,
    why: MissingReason,
    misses: MissingCounter,
) -> Exact | Patched:
    """Return the proximal log-probs of a batch, with `policy` applied to the missing ones.

    scores: with the values of surrogate:current_recompute, if that is the policy; holes: the missing ones. Raises
    UserError if a value is missing and the policy is `fail`.
    """
    values, shared, passes, routes = scores.values, scores.shared, scores.passes, scores.routes
    if not any(hole.any() for hole in holes):
        return Exact(values, shared=shared, passes=passes, routes=routes)
    _report(holes, batches, policy=policy, why=why, misses=misses)
    missing = [torch.from_numpy(hole).to(value.device) for hole, value in zip(holes, values, strict=True)]
    if policy == "drop":
        return Exact(values, missing, shared=shared, passes=passes, routes=routes)
    if policy == "surrogate:bypass":
        for batch, where, value in zip(batches, missing, values, strict=True):
            value.copy_(torch.where(where, torch.from_numpy(batch.behavior).to(value.device), value))
    return Patched(values, missing, policy.removeprefix(SURROGATE), shared=shared, passes=passes, routes=routes)


def _report(
    holes: Holes, batches: Sequence[PaddedBatch], *, policy: MissingPolicy, why: MissingReason, misses: MissingCounter
) -> None:
    """Count and log the missing tokens. Raises UserError if the policy is `fail`."""
    tokens = sum(int(hole.sum()) for hole in holes)
    misses.add(why, policy, tokens)
    versions, trajectories = _affected(holes, batches)
    logger().warning(
        "old log-probs missing", why=why.value, policy=policy, tokens=tokens, trajectories=trajectories,
        versions=_listed(versions),
    )  # fmt: skip
    if policy == "fail":
        raise UserError(_error_message(why, tokens, versions, trajectories), _CODE[why])


def _affected(holes: Holes, batches: Sequence[PaddedBatch]) -> tuple[list[Version], int]:
    """Versions of the tokens in holes, ascending, and the number of trajectories with holes."""
    versions = np.unique(np.concatenate([batch.versions[hole] for batch, hole in zip(batches, holes, strict=True)]))
    return [Version(int(v)) for v in versions], sum(int(hole.any(axis=1).sum()) for hole in holes)


def _listed(versions: Sequence[Version]) -> str:
    named = ", ".join(map(str, versions[:MOST_NAMED]))
    return named if len(versions) <= MOST_NAMED else f"{named} and {len(versions) - MOST_NAMED} more"


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number} {thing if number == 1 else things or thing + 's'}"


_CODE = {
    MissingReason.VERSION_GONE: ExitCode.DAMAGED,
    MissingReason.NOT_SCORED: ExitCode.UNAVAILABLE,
    MissingReason.TOO_LATE: ExitCode.UNAVAILABLE,
}


def _error_message(why: MissingReason, tokens: int, versions: Sequence[Version], trajectories: int) -> str:
    one = len(versions) == 1
    named = f"version{'' if one else 's'} {_listed(versions)}"
    where = f"{_count(tokens, 'token')} in {_count(trajectories, 'trajectory', 'trajectories')}"
    otherwise = 'or leave such tokens out of the loss (learner.proximal.missing = "drop")'
    match why:
        case MissingReason.VERSION_GONE:
            return (
                f"old log-probs cannot be computed: {named} {'is' if one else 'are'} not in the store, but the batch "
                f"holds {where} sampled by {'it' if one else 'them'}, within learner.max_staleness. Restore the "
                f"store's folder from a copy and continue with --resume, {otherwise}"
            )
        case MissingReason.NOT_SCORED:
            return (
                f"no replica scored {where} sampled by {named} within learner.proximal.wait_s. Check the replicas' "
                f"logs, start more replicas (local.replicas, or python -m palimpsest.services.learner.replica) and "
                f"continue with --resume, {otherwise}"
            )
        case MissingReason.TOO_LATE:
            return (
                f"{where} sampled by {named} arrived after the weights of {named} had changed, and cannot be scored. "
                f"Give workers more time to pause (learner.proximal.deadline_s), {otherwise}"
            )
