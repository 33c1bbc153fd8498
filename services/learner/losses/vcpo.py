"""VCPO: effective sample size, the learning rate scaled by it, and the minimum-variance baseline
(docs/algorithms/vcpo.md). Pure.

    ESS = (sum w)^2 / sum w^2        lr * min(1, (ESS / N) / base)^power        b = sum w^2 |g|^2 R / sum w^2 |g|^2

w is a trajectory's total ratio, g the gradient of its log-prob without w, R its reward, N the number of trajectories.
The baseline b is computed for each group.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import unclamped_log_ratio

Gather = Callable[[tuple[float, ...]], list[tuple[float, ...]]]
"""Returns the values of all ranks, on every rank."""
POWERS = {"sqrt": 0.5, "linear": 1.0}
"""Power of the effective sample share, by the name of the scaling."""


def trajectory_log_ratio(current: Tensor, behavior: Tensor, mask: Tensor) -> Tensor:
    """Return log w of each row, [rows] float64 without gradient: the sum of its total log-ratios.

    A token whose log-prob is not finite adds 0. Nothing is truncated, because truncated weights overstate the effective
    sample size.
    """
    usable = mask & torch.isfinite(current) & torch.isfinite(behavior)
    return unclamped_log_ratio(current.detach().double(), behavior.detach().double(), usable).sum(-1)


def ess(log_weights: Tensor, *, gather: Gather) -> float:
    """Return ESS / N of the minibatch's trajectories: 1 for equal weights, 1 / N if one weight dominates.

    log_weights: [trajectories] of this rank, possibly none. Every rank calls this function. The largest log-weight of
    all ranks is subtracted first, so that nothing overflows; the result does not depend on the scale of the weights. 1
    without a trajectory. Raises ValueError, on every rank, if a log-weight on any rank is not finite.
    """
    mine = log_weights.detach().double().cpu()
    finite = bool(torch.isfinite(mine).all())
    heads = gather((float(len(mine)), float(mine.max()) if len(mine) else -math.inf, float(finite)))
    if not all(head[2] for head in heads):
        raise ValueError("a trajectory's log-weight is not finite: leave it out of the effective sample size")
    count, shift = sum(head[0] for head in heads), max(head[1] for head in heads)
    if not count:
        return 1.0
    weights = (mine - shift).exp()
    sums = gather((float(weights.sum()), float(weights.square().sum())))
    return sum(part[0] for part in sums) ** 2 / sum(part[1] for part in sums) / count


def lr_factor(share: float, base: float, power: float) -> float:
    """Return the factor on the learning rate of the next optimizer step only: min(1, share / base)^power.

    share: ESS / N; base: share from which the factor is 1; power: see POWERS. Raises ValueError for a share outside
    [0, 1] or a power that is not positive.
    """
    if not 0 <= share <= 1 + 1e-9:
        raise ValueError(f"the effective sample share is {share}; it must be in [0, 1]")
    if not power > 0:
        raise ValueError(f"the power of the effective sample share is {power}; it must be above 0")
    return 1.0 if share >= base else float((share / base) ** power)


def minimum_variance_baseline(
    weights: Sequence[float] | Tensor, squared_norms: Sequence[float] | Tensor, rewards: Sequence[float] | Tensor
) -> float:
    """Return the baseline b of a group for which the gradient sum_i w_i (R_i - b) g_i has the least variance.

    [trajectories] each, of all ranks: weights w_i; squared norms of g_i, the gradient *without* w_i; rewards. For
    squared norms of w_i g_i, pass weights of 1, so that the weight counts once. Only the proportions of the weights
    matter. If no trajectory has a gradient, the result is the mean reward. Raises ValueError if lengths differ, there
    is no trajectory, or a number is not finite.
    """
    w, norms, r = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (weights, squared_norms, rewards))
    if not len(w) == len(norms) == len(r) or not len(w):
        raise ValueError(f"{len(w)} weights, {len(norms)} norms and {len(r)} rewards; give one of each per trajectory")
    if not all(bool(torch.isfinite(x).all()) for x in (w, norms, r)):
        raise ValueError("a weight, norm or reward is not finite; leave its trajectory out of the baseline")
    largest = float(w.abs().max())
    importance = (w / largest).square() * norms if largest else torch.zeros_like(w)
    total = float(importance.sum())
    return float((importance * r).sum()) / total if total > 0 else float(r.mean())


def subtract_baseline(weighted: Sequence[Tensor], scores: Sequence[Tensor], baseline: float) -> None:
    """Subtract b times sum_i w_i g_i (scores) from sum_i w_i R_i g_i (weighted), in place, tensor by tensor."""
    for first, second in zip(weighted, scores, strict=True):
        first.sub_(second, alpha=baseline)
