"""Surrogate: a moving average whose age is that of the data, and that can be reset (docs/algorithms/ppo-ewma-async.md).

Like ewma_prox, with beta from a window of versions or from the measured staleness, and with resets (reset_rule.py).
All ranks get the same values and compute the same result, so their averages stay equal without communication.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.surrogates.forward_pass import Shadow, SplitPolicy, score
from palimpsest.services.learner.proximal.surrogates.reset_rule import HEALTHY_VERSIONS, Cause, ResetState, Rule, decide
from palimpsest.services.learner.proximal.surrogates.weight_average import (
    Average,
    refuse_others,
    staleness_decay,
    window_decay,
)
from palimpsest.services.learner.proximal.types import Surrogate

LoadVersion = Callable[[Version], Sequence[Tensor] | None]
"""Version -> its weights in the order of the masters, float32; None if the store does not hold it."""
MEASURING_DECAY = 0.9
"""Decay of the running mean of staleness: about ten versions."""
SETTLING = 3
"""An average reaches its age after about this multiple of it; until then, beta does not change again."""


class PpoEwmaAsync:
    """The ppo_ewma_async source; see Source and StatefulSource in proximal/types.py."""

    def __init__(
        self,
        model: torch.nn.Module,
        masters: Sequence[Tensor],
        device: torch.device,
        *,
        window: int | Literal["measured"],
        rule: Rule,
        load: LoadVersion | None = None,
        split: SplitPolicy | None = None,
    ) -> None:
        """masters: float32 weights of the model's version; window: W; load: gives a stored version to a guarded reset;
        split: of a sharded policy.

        Raises ValueError for a negative window.
        """
        self.average = Average(masters, gather=None if split is None else split.gather)
        self.resets = dict.fromkeys(Cause, 0)
        """Cause -> resets so far."""
        self.mean_staleness = 0.0
        """Bias-corrected running mean over versions; 0 before the first measurement."""
        self._measured = 0.0
        """Weight of the running mean."""
        self._window = window
        self._target = 0.0 if window == "measured" else window / 2
        """Target mean age of the average."""
        self._settled = 0
        """Versions since the last change of beta."""
        self._rule, self._seen = rule, ResetState()
        self._decay = 0.0 if window == "measured" else window_decay(window)
        self._shadow, self._device, self._load = Shadow(model, split), device, load

    @property
    def decay(self) -> float:
        """Present beta."""
        return self._decay

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Surrogate:
        """Score the micro-batches with the average, cast to the dtype of the model."""
        model = self._shadow.with_weights(self.average.means)
        return Surrogate(score(model, batches, self._device), method="ppo_ewma_async")

    def published(
        self,
        masters: Sequence[Tensor],
        *,
        active_share: float,
        mean_staleness: float,
        unmasked_share: float = math.nan,
        version: Version | None = None,
    ) -> None:
        """Do one tick, or a reset instead. NaN for either number: the version had no trainable token."""
        share = unmasked_share if self._rule.trigger == "mask" else active_share
        seen, cause = decide(self._seen, share, self._rule)
        self._measure(mean_staleness)
        self._seen = seen
        if cause is None:
            self.average.take(masters, decay=self._decay)
        else:
            self.resets[cause] += 1
            self._restart(masters, version)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the average, the measurement and the history of resets. Its shapes never change."""
        healthy = [*self._seen.healthy, *[math.nan] * (HEALTHY_VERSIONS - len(self._seen.healthy))]
        since = -1 if self._seen.since is None else self._seen.since
        pace = [self.mean_staleness, self._measured, self._target, float(self._settled)]
        return self.average.state() | {
            "pace": torch.tensor(pace, dtype=torch.float64),
            "healthy": torch.tensor(healthy, dtype=torch.float64),
            "seen": torch.tensor([self._seen.low, since], dtype=torch.int64),
            "resets": torch.tensor([self.resets[cause] for cause in Cause], dtype=torch.int64),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly from there; a window that is not measured is the present configuration's."""
        refuse_others(self.state(), tensors)
        self.average.restore({name: tensors[name] for name in self.average.state()})
        self.mean_staleness, self._measured, target, settled = tensors["pace"].tolist()
        if self._window == "measured":
            self._target, self._settled = target, int(settled)
            self._decay = staleness_decay(target)
        low, since = tensors["seen"].tolist()
        healthy = tuple(share for share in tensors["healthy"].tolist() if not math.isnan(share))
        self._seen = ResetState(healthy, low, None if since < 0 else since)
        self.resets = dict(zip(Cause, tensors["resets"].tolist(), strict=True))

    def _restart(self, masters: Sequence[Tensor], version: Version | None) -> None:
        """Restart the average. `guarded`: with the stored version whose age is the mean staleness, rounded up.

        Without that version, restart with `masters`, the weights of `version`.
        """
        if self._rule.reset == "guarded" and self._load is not None and version is not None:
            age = min(math.ceil(self.mean_staleness), version)
            stored = self._load(Version(version - age)) if age else None
            if stored is not None:
                self.average.reset(stored, age=age)
                return
        self.average.reset(masters)

    def _measure(self, mean_staleness: float) -> None:
        """Add this version's staleness, and change beta if the average has settled since the last change."""
        if mean_staleness < 0 or math.isinf(mean_staleness):
            raise ValueError(f"the mean staleness is {mean_staleness} versions; it must be finite and at least 0")
        if not math.isnan(mean_staleness):
            self._measured = MEASURING_DECAY * self._measured + 1
            self.mean_staleness += (mean_staleness - self.mean_staleness) / self._measured
        if self._window != "measured":
            return
        self._settled += 1
        if self._settled >= math.ceil(SETTLING * self._target) and self._target != self.mean_staleness:
            self._target, self._settled = self.mean_staleness, 0
            self._decay = staleness_decay(self._target)
