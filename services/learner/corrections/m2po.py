"""M2PO: the tokens of largest squared log-discrepancy are masked until the mean square of the rest is small. Pure."""

import math

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.rules import Gather


def m2_threshold(log_discrepancies: Tensor, bound: float, *, gather: Gather) -> float:
    """Largest squared log-discrepancy that is kept, of a minibatch over all ranks. nats^2; infinite when all are.

    log_discrepancies: [tokens] of this rank, nats; may be empty. All ranks call it and get the same number. Tokens
    that are equal in square are kept or masked together; the mean square of the kept is below the bound.
    """
    squares = squared(log_discrepancies).cpu()
    # what is below the bound is kept by any answer: its mean is below too. So only the few others travel.
    certain = squares < bound
    shares = gather((float(squares[certain].sum()), int(certain.sum()), squares[~certain].numpy()))
    total, count = math.fsum(share[0] for share in shares), sum(share[1] for share in shares)
    doubtful = torch.cat([torch.from_numpy(share[2]) for share in shares]).sort().values
    means = (total + doubtful.cumsum(dim=0)) / (count + torch.arange(1, len(doubtful) + 1))
    # ascending values: once the mean has reached the bound, it stays there
    reached = (means >= bound).nonzero()
    if not len(reached):
        return math.inf
    # the first that goes takes its equals along
    kept = int((doubtful < doubtful[int(reached[0])]).sum())
    return float(doubtful[kept - 1]) if kept else math.nextafter(bound, 0.0)


def m2_rule(log_discrepancy: Tensor, usable: Tensor, threshold: float) -> Tensor:
    """Tokens beyond the threshold of the minibatch. bool [rows, tokens]: removed"""
    return usable & (squared(log_discrepancy) > threshold)


def squared(log_discrepancy: Tensor) -> Tensor:
    """In float64, where the square of a float32 is exact: the same number wherever it is computed."""
    return log_discrepancy.double().square()
