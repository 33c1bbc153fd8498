"""Sources of the proximal: exact old log-probs from the store, and the surrogates of the learner."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.mismatch.toy import Policy, Store, Toy
from palimpsest.common.config.proximal import (
    BypassProximal,
    CurrentRecomputeProximal,
    EwmaProximal,
    LinearProximal,
    LoglinearProximal,
    PpoEwmaAsyncProximal,
    SurrogateConfig,
)
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, versions_present
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.types import Exact, Source

EXACT = "exact"
SURROGATES: dict[str, SurrogateConfig] = {
    "current_recompute": CurrentRecomputeProximal(kind="current_recompute"),
    "interp_prox_loglinear": LoglinearProximal(kind="interp_prox_loglinear"),
    "linear_prox": LinearProximal(kind="linear_prox"),
    # a decay that does not follow the window (W / (W + 2) would make it ppo_ewma_async without resets)
    "ewma_prox": EwmaProximal(kind="ewma_prox", decay=0.9),
    "ppo_ewma_async_off": PpoEwmaAsyncProximal(kind="ppo_ewma_async", reset="off"),
    "ppo_ewma_async_paper": PpoEwmaAsyncProximal(kind="ppo_ewma_async", reset="paper"),
    "ppo_ewma_async_guarded": PpoEwmaAsyncProximal(kind="ppo_ewma_async", reset="guarded"),
    "bypass": BypassProximal(kind="bypass"),
}
REFERENCES = (EXACT, *SURROGATES)
DECAYS = (0.0, 1 / 3, 0.5, 2 / 3, 0.8, 8 / 9, 0.95)
"""Decays of the moving averages whose leak is compared."""
CPU = torch.device("cpu")


class Stored:
    """Exact old log-probs: the stored weights of its version score each token. A Source of proximal/types.py."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @torch.no_grad()
    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:  # noqa: ARG002
        """Return the old log-probs. Runs one pass per version, over the rows with its tokens."""
        tokens = torch.cat([torch.from_numpy(batch.tokens) for batch in batches])
        versions = torch.cat([torch.from_numpy(batch.versions) for batch in batches])
        temperatures = torch.cat([torch.from_numpy(batch.temperatures) for batch in batches])
        logprobs = torch.zeros(tokens.shape)
        for version in versions_present([row for batch in batches for row in batch.rows]):
            rows = (versions == version).any(1).nonzero()[:, 0]
            scored = token_logprobs(self._store.policy(version), tokens[rows], temperatures[rows])
            logprobs[rows] = torch.where(versions[rows] == version, scored, logprobs[rows])
        sizes = [len(batch.tokens) for batch in batches]
        return Exact(list(torch.split(logprobs, sizes)))


def source(reference: str, *, store: Store, policy: Policy, toy: Toy) -> Source:
    """Return the source of this name. The store must hold the first version. Raises KeyError for an unknown name."""
    if reference == EXACT:
        return Stored(store)
    return build_surrogate(
        SURROGATES[reference], model=policy, masters=masters(policy), device=CPU, max_staleness=toy.window
    )


def masters(policy: Policy) -> list[Tensor]:
    """Return the float32 weights of the policy."""
    return [parameter.detach() for parameter in policy.parameters()]
