"""The tokens of a version's training, one after another, with what the metrics need beside their log-probs."""

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
    """Arrays are [tokens], in the order of `tokens`."""

    tokens: Tokens
    weight: Array
    """The correction's factor on the token's loss, float64; 0 where masked."""
    trajectory: Array
    """Number of the trajectory, from 0, those without trainable tokens counted."""
    exact: Array
    """bool: what stands in the proximal's place is the old log-prob."""
    first: Array
    """bool: of the first minibatch."""
    audited: Array
    """bool: the old log-prob was scored beside a surrogate's."""

    @classmethod
    def of(cls, scored: Sequence[MicroBatchResult], now: Version) -> "TokenTable":
        """Of all micro-batches. Raises ValueError for none."""
        weight, trajectory, exact, first, audited = [], [], [], [], []
        rows = 0
        for part in scored:
            mask = torch.from_numpy(part.batch.mask)
            count = int(mask.sum())
            weight.append(part.correction.weight[mask].double().numpy())
            trajectory.append(rows + np.nonzero(part.batch.mask)[0])
            exact.append(part.anchor.exact[mask].numpy())
            first.append(np.full(count, part.first))
            audited.append(np.full(count, part.old is not None))
            rows += len(part.batch.rows)
        columns = (weight, trajectory, exact, first, audited)
        return cls(Tokens.joined([part.tokens(now) for part in scored]), *map(np.concatenate, columns))
