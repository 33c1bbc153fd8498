"""The surrogate that a run's configuration names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.config.proximal import (
    BypassProximal,
    CurrentRecomputeProximal,
    EwmaProximal,
    LinearProximal,
    LoglinearProximal,
    PpoEwmaAsyncProximal,
    ProximalConfig,
)
from palimpsest.services.learner.proximal.surrogates.bypass import Bypass
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.interp_prox_loglinear import Loglinear
from palimpsest.services.learner.proximal.surrogates.linear_prox import LinearProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.surrogates.reset_rule import Rule
from palimpsest.services.learner.proximal.types import Source


def build_surrogate(
    config: ProximalConfig,
    *,
    model: torch.nn.Module,
    masters: Sequence[Tensor],
    device: torch.device,
    max_staleness: int,
) -> Source:
    """Its source. masters: float32 weights that the model was cast from; a moving average begins with them.

    Raises ValueError for an exact kind: that is no surrogate.
    """
    match config:
        case BypassProximal():
            return Bypass(device)
        case CurrentRecomputeProximal():
            return CurrentRecompute(model, device)
        case LoglinearProximal():
            return Loglinear(device)
        case LinearProximal():
            return LinearProx(device, behavior_share=config.behavior_share)
        case EwmaProximal():
            return EwmaProx(model, masters, device, decay=config.decay)
        case PpoEwmaAsyncProximal():
            window = max_staleness if config.window == "max_staleness" else config.window
            rule = Rule(config.reset, config.threshold, config.patience, config.cooldown)
            return PpoEwmaAsync(model, masters, device, window=window, rule=rule)
    raise ValueError(f"learner.proximal.kind is {config.kind!r}, which is exact: it is not made here")
