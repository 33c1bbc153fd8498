"""M2PO: a clip whose width follows from the second moment of the harmful log-ratios (docs/algorithms/m2po.md). Pure.

r = pi_theta / mu        Delta = log r        harmful: A > 0 and r > 1, or A < 0 and r < 1

tau^2 = the largest Delta_k^2 of a harmful token with   sum_i min(Delta_i^2, Delta_k^2)  <=  budget * n_harmful
low = min(e^-tau, 1 - clip_low)        high = max(e^tau, 1 + clip_high)
loss = -min(r A, clip(r, low, high) A)
"""

import math

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import beyond_bound, log_ratio
from palimpsest.services.learner.corrections.rules import Gather
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero, refuse_bounds


def harmful_squares(inputs: Inputs) -> Tensor:
    """Return Delta^2 of the usable tokens whose ratio moved in the direction of their advantage. [tokens] float64."""
    usable = inputs.usable
    delta = log_ratio(inputs.current.detach().double(), inputs.behavior.detach().double(), usable)
    return delta[usable & (delta * masked_fill_zero(inputs.advantages, usable) > 0)].square()


def m2po_tau(squares: Tensor, budget: float, *, gather: Gather) -> float:
    """Return tau of a minibatch over all ranks, nats; 0 without a harmful token, or if no token fits the budget.

    squares: see `harmful_squares`, of this rank; may be empty. budget: nats^2. All ranks call this function and get the
    same result. Only squares above the budget travel between ranks, because all others fit the budget.
    """
    own = squares.cpu()
    small, large = own[own <= budget], own[own > budget]
    parts = gather((float(small.sum()), len(small), float(small.max()) if len(small) else 0.0, large.numpy()))
    total, count = math.fsum(part[0] for part in parts), sum(part[1] for part in parts)
    above = torch.cat([torch.from_numpy(part[3]) for part in parts]).sort().values
    behind = torch.arange(len(above) - 1, -1, -1)
    fits = total + above.cumsum(dim=0) + behind * above <= budget * (count + len(above))
    chosen = above[fits]
    return math.sqrt(float(chosen[-1]) if len(chosen) else max(part[2] for part in parts))


def m2po_loss(inputs: Inputs, *, tau: float, clip_low: float, clip_high: float) -> Outcome:
    """Return the loss of each token. The causes "clip_high", "clip_low" and "ratio_bound" mark tokens without gradient.

    tau: see `m2po_tau`. clip_low, clip_high: least width of the clip. `weight` only selects the kept tokens, because r
    is the total ratio. Raises ValueError for invalid bounds.
    """
    refuse_bounds(clip_low, clip_high)
    usable = inputs.usable
    log_total = log_ratio(inputs.current, inputs.behavior.detach(), usable)
    advantages, moved = masked_fill_zero(inputs.advantages, usable), log_total.detach()
    log_low = min(-tau, math.log1p(-clip_low) if clip_low < 1 else -math.inf)
    log_high = max(tau, math.log1p(clip_high))
    high, low = (advantages > 0) & (moved > log_high), (advantages < 0) & (moved < log_low)
    value = torch.where(high, math.exp(log_high) * advantages, log_total.exp() * advantages)
    value = torch.where(low, math.exp(log_low) * advantages, value)
    lost = beyond_bound(inputs.current, inputs.behavior, usable) & (advantages != 0)
    causes = {"clip_high": high, "clip_low": low, "ratio_bound": lost}
    return Outcome(masked_fill_zero(-value, usable), causes, log_total.detach())
