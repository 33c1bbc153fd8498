"""What becomes of tokens whose old log-probs are not to be had: as the run's `missing` says, counted, and never silent.

fail                          end the run, saying what is missing
drop                          leave them out of the loss
surrogate:bypass              the behavior log-probs in their place
surrogate:current_recompute   those of the weights before the version's first optimizer step
"""

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.logs import logger
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.types import Exact, Patched

Holes = list[NDArray[np.bool_]]
"""For each micro-batch [rows, tokens]: trainable, and its old log-prob is not to be had."""
MOST_NAMED = 5
SURROGATE = "surrogate:"


class MissingReason(StrEnum):
    """Why an old log-prob is missing."""

    VERSION_GONE = "version_gone"
    """The store does not hold the version's weights any more."""
    NOT_SCORED = "not_scored"
    """No replica scored the token in time."""
    TOO_LATE = "too_late"
    """The token came after its version's weights had changed."""


class MissingCounter:
    """Tokens without an old log-prob since the process began. All zero while nothing goes wrong."""

    def __init__(self) -> None:
        self.tokens: Counter[tuple[str, str]] = Counter()
        """(why, policy) -> tokens."""
        self._taken: Counter[tuple[str, str]] = Counter()

    def add(self, why: MissingReason, policy: MissingPolicy, tokens: int) -> None:
        """So many tokens went the policy's way."""
        self.tokens[why.value, policy] += tokens

    def take(self) -> dict[tuple[str, str], int]:
        """Those since the last call."""
        new = self.tokens - self._taken
        self._taken = self.tokens.copy()
        return dict(new)


def apply_missing_policy(
    values: list[Tensor],
    holes: Holes,
    batches: Sequence[PaddedBatch],
    *,
    policy: MissingPolicy,
    why: MissingReason,
    misses: MissingCounter,
    recompute: Callable[[PaddedBatch, NDArray[np.bool_], Tensor], None],
) -> Exact | Patched:
    """The proximal log-probs of a batch some of whose old ones may be missing. Raises UserError when policy is `fail`.

    values: for each micro-batch [rows, tokens] float32, the old log-probs, 0 where untrainable or missing;
    recompute: writes the present weights' log-probs of a micro-batch where they are wanted.
    """
    tokens = sum(int(hole.sum()) for hole in holes)
    if not tokens:
        return Exact(values)
    misses.add(why, policy, tokens)
    versions, trajectories = _concerned(holes, batches)
    logger().warning(
        "old log-probs missing", why=why.value, policy=policy, tokens=tokens, trajectories=trajectories,
        versions=_listed(versions),
    )  # fmt: skip
    if policy == "fail":
        raise UserError(_error_message(why, tokens, versions, trajectories), _CODE[why])
    absent = [torch.from_numpy(hole).to(value.device) for hole, value in zip(holes, values, strict=True)]
    if policy == "drop":
        return Exact(values, absent)
    for batch, hole, lacking, value in zip(batches, holes, absent, values, strict=True):
        if policy == "surrogate:bypass":
            value.copy_(torch.where(lacking, torch.from_numpy(batch.behavior).to(value.device), value))
        else:
            recompute(batch, hole, value)
    return Patched(values, absent, policy.removeprefix(SURROGATE))


def _concerned(holes: Holes, batches: Sequence[PaddedBatch]) -> tuple[list[Version], int]:
    """Versions with holes, ascending, and the number of trajectories."""
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
    otherwise = 'or let a run do without such tokens (learner.proximal.missing = "drop")'
    match why:
        case MissingReason.VERSION_GONE:
            return (
                f"old log-probs cannot be computed: {named} {'is' if one else 'are'} not in the store any more, though "
                f"the batch holds {where} sampled by {'it' if one else 'them'}, inside learner.max_staleness. Was the "
                f"store's folder changed by hand? Restore it from a copy and start again with --resume, {otherwise}"
            )
        case MissingReason.NOT_SCORED:
            return (
                f"no replica scored {where} sampled by {named} within learner.proximal.wait_s. Look at the replicas' "
                f"logs, start more of them (local.replicas, or python -m palimpsest.services.learner.replica) and "
                f"start again with --resume, {otherwise}"
            )
        case MissingReason.TOO_LATE:
            return (
                f"{where} sampled by {named} came when those weights had changed already, so they cannot be scored any "
                f"more. Give workers longer to stop (learner.proximal.deadline_s), {otherwise}"
            )
