"""Build the surrogate source that `learner.proximal` configures."""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from palimpsest.common.config.proximal import (
    BypassProximal,
    CurrentRecomputeProximal,
    EwmaProximal,
    LinearProximal,
    LoglinearProximal,
    PpoEwmaAsyncProximal,
    SurrogateConfig,
)
from palimpsest.services.learner.proximal.surrogates.bypass import Bypass
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.forward_pass import SplitPolicy
from palimpsest.services.learner.proximal.surrogates.interp_prox_loglinear import Loglinear
from palimpsest.services.learner.proximal.surrogates.linear_prox import LinearProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import LoadVersion, PpoEwmaAsync
from palimpsest.services.learner.proximal.surrogates.reset_rule import Rule
from palimpsest.services.learner.proximal.types import Source


def build_surrogate(
    config: SurrogateConfig,
    *,
    model: torch.nn.Module,
    masters: Sequence[Tensor],
    device: torch.device,
    max_staleness: int,
    load: LoadVersion | None = None,
    split: SplitPolicy | None = None,
) -> Source:
    """Build the source of a surrogate.

    masters: float32 weights that the model was cast from; a moving average starts from them. load: see PpoEwmaAsync.
    split: of a sharded policy.
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
            return EwmaProx(model, masters, device, decay=config.decay, split=split)
        case PpoEwmaAsyncProximal():
            window = max_staleness if config.window == "max_staleness" else config.window
            rule = Rule(config.reset, config.threshold, config.patience, config.cooldown, config.trigger)
            return PpoEwmaAsync(model, masters, device, window=window, rule=rule, load=load, split=split)
    assert_never(config)
