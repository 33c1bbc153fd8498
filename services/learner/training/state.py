"""Training state beside the policy: the other objects with a state that a checkpoint must hold.

These are the proximal source (a moving average has a state), the critic, R2VPO's multiplier and EPO's history of
entropies. The starting model, from which the KL divergence is measured, is here too. A restart builds it again; if it
has an adapter, the adapter is in the checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.entropy import EntropyHistory
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.lora import adapter_weights
from palimpsest.services.learner.old_logprobs.missing import MissingCounter
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.types import Source, StatefulSource

PREFIX = "companions."


@dataclass
class TrainingState:
    """Training state of one rank, beside the policy."""

    source: Source
    auditor: Source | None = None
    """An exact source that scores a share of the versions beside a surrogate."""
    critic: Critic | None = None
    start: torch.nn.Module | None = None
    """The model at version 0; None if the loss has no KL divergence."""
    multiplier: float = 0.0
    """R2VPO's lambda."""
    entropies: EntropyHistory = field(default_factory=EntropyHistory)
    misses: MissingCounter = field(default_factory=MissingCounter)
    """Counts tokens without an old log-prob."""

    def expect(self, version: Version) -> None:
        """Tell the sources that the next batch may have tokens of this version, which the store holds."""
        for source in (self.source, self.auditor):
            if isinstance(source, SnapshotSource):
                source.expect(version)

    @property
    def stateful_source(self) -> StatefulSource | None:
        """The source if it has a state, else None."""
        return self.source if isinstance(self.source, StatefulSource) else None

    def missed(self, ranks: ProcessGroup) -> dict[str, int]:
        """Return "reason/policy" -> tokens of all ranks without an old log-prob since the last call."""
        missed: dict[str, int] = {}
        for part in ranks.gather_shares(self.misses.take()):
            for (reason, policy), tokens in part.items():
                missed[f"{reason}/{policy}"] = missed.get(f"{reason}/{policy}", 0) + tokens
        return missed

    def gauges(self, masters: Sequence[Tensor]) -> dict[str, float]:
        """Values for the metrics, by name. masters: float32 weights of the policy."""
        history = self.entropies.mean
        gauges = {"multiplier": self.multiplier, "entropy_history": math.nan if history is None else history}
        if isinstance(self.source, EwmaProx | PpoEwmaAsync):
            gauges |= {
                "ewma_decay": self.source.decay,
                "ewma_age": self.source.average.center_of_mass,
                "ewma_weight": self.source.average.weight,
                "ewma_distance": self.source.average.distance(masters),
            }
        if isinstance(self.source, PpoEwmaAsync):
            gauges["ewma_resets"] = float(sum(self.source.resets.values()))
        return gauges

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint, by name."""
        history = self.entropies.state()
        parts = {
            "source": self.stateful_source.state() if self.stateful_source else {},
            "critic": self.critic.state() if self.critic else {},
            "start": self._starting_adapter(),
            "scalars": {
                "multiplier": torch.tensor(self.multiplier, dtype=torch.float64),
                "entropies": torch.tensor(history["mean"], dtype=torch.float64),
                "entropy_turns": torch.tensor(history["turns"], dtype=torch.float64),
            },
        }
        return {f"{PREFIX}{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from a checkpoint. Raises ValueError if it is of another configuration."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, own = name.removeprefix(PREFIX).partition(".")
            parts.setdefault(part, {})[own] = tensor
        if self.stateful_source:
            self.stateful_source.restore(parts.get("source", {}))
        if self.critic:
            self.critic.restore(parts.get("critic", {}))
        if "start" in parts and self.start is not None:
            adapter = adapter_weights(self.start) or {}
            for name, tensor in parts["start"].items():
                adapter[name].copy_(tensor)
        scalars = parts["scalars"]
        self.multiplier = float(scalars["multiplier"])
        histories = {"mean": scalars["entropies"].tolist()}
        if "entropy_turns" in scalars:  # not in a checkpoint of an older release
            histories["turns"] = scalars["entropy_turns"].tolist()
        self.entropies.restore(histories)

    def _starting_adapter(self) -> dict[str, Tensor]:
        """The adapter of version 0, float32: a restart does not read learner.lora.start. {} if there is none."""
        adapter = None if self.start is None else adapter_weights(self.start)
        return {name: tensor.float() for name, tensor in (adapter or {}).items()}


def split_checkpoint(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a checkpoint's tensors into those of the policy and those of the training state."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    return own, {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
