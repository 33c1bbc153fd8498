"""The trained tokens of a version as columns. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.common.versions import Version
from palimpsest.services.learner.observability.token_statistics import Tokens
from palimpsest.services.learner.training.results import MicroBatchResult

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """All trainable tokens of a version. Arrays are [tokens]."""

    tokens: Tokens
    weight: Array
    """The correction's factor on the token's loss, float64; 0 where masked."""
    trajectory: Array
    """Number of the token's trajectory, from 0. Trajectories without trainable tokens have a number too."""
    exact: Array
    """bool: tokens whose proximal log-prob is the old log-prob."""
    first: Array
    """bool: tokens of the first minibatch."""
    audited: Array
    """bool: tokens of an audited batch, whose old log-probs were scored beside the surrogate."""

    @classmethod
    def of(cls, results: Sequence[MicroBatchResult], now: Version) -> "TokenTable":
        """Return the tokens of all micro-batches trained at version `now`. Raises ValueError without micro-batches."""
        weight, trajectory, exact, first, audited = [], [], [], [], []
        rows = 0
        for part in results:
            mask = torch.from_numpy(part.batch.mask)
            count = int(mask.sum())
            weight.append(part.correction.weight[mask].double().numpy())
            trajectory.append(rows + np.nonzero(part.batch.mask)[0])
            exact.append(part.anchor.exact[mask].numpy())
            first.append(np.full(count, part.first))
            audited.append(np.full(count, part.old is not None))
            rows += len(part.batch.rows)
        columns = (weight, trajectory, exact, first, audited)
        return cls(Tokens.joined([flatten(part, now) for part in results]), *map(np.concatenate, columns))


def flatten(result: MicroBatchResult, now: Version) -> Tokens:
    """Return the trainable tokens of one micro-batch, trained at version `now`."""
    mask = torch.from_numpy(result.batch.mask)
    unknown = torch.full_like(result.current, float("nan"))
    old = torch.where(result.anchor.exact, result.proximal, unknown) if result.old is None else result.old
    causes = result.correction.causes | result.clipped
    return Tokens(
        staleness=(now - torch.from_numpy(result.batch.versions))[mask].numpy(),
        behavior=torch.from_numpy(result.batch.behavior)[mask].numpy(),
        proximal=result.proximal[mask].numpy(),
        current=result.current[mask].numpy(),
        old=old[mask].numpy(),
        entropy=result.entropy[mask].numpy(),
        advantages=result.advantages[mask].numpy(),
        masked=result.correction.masked[mask].numpy(),
        clipped=torch.stack([torch.zeros_like(mask), *result.clipped.values()]).any(0)[mask].numpy(),
        causes={cause: removed[mask].numpy() for cause, removed in causes.items()},
    )
