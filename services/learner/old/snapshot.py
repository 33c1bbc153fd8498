"""Exact old log-probs from the snapshot store (docs/paper.md, "snapshot source").

A shadow copy of the model takes on one version after another and scores the rows that hold tokens of that version; each
token keeps the value of its own version. Tokens of the current version need no copy: the model itself still is that
version, because this happens before the first optimizer step. Cost: one bf16 copy, and one pass over a row for each
version in it.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.refusal import ExitCode, Refusal
from common.snapshots.client import SnapshotClient, VersionMissing
from common.snapshots.manifest import Damaged
from common.versions import Version
from services.learner.batching import Padded, pad, places_of_version, versions_present
from services.learner.model import take_on, token_logprobs
from services.learner.proximal import Exact


class SnapshotSource:
    """See proximal.py."""

    def __init__(
        self, model: torch.nn.Module, store: SnapshotClient, device: torch.device, *, loaded: Callable[[Version], None]
    ) -> None:
        self._model, self._store, self._device = model, store, device
        self._shadow: torch.nn.Module | None = None
        self._shadow_version: Version | None = None
        self._loaded = loaded

    @torch.no_grad()
    def proximal(self, batches: Sequence[Padded], now: Version) -> Exact:
        """Scored version by version, the shadow's present one first."""
        logprobs = [torch.zeros(batch.tokens.shape, device=self._device) for batch in batches]
        present = versions_present([row for batch in batches for row in batch.rows])
        for version in sorted(present, key=lambda v: (v != self._shadow_version, v)):
            model = self._model if version == now else self._load(version)
            for batch, values in zip(batches, logprobs, strict=True):
                _score(model, batch, version, values)
        return Exact(logprobs)

    def _load(self, version: Version) -> torch.nn.Module:
        if self._shadow is None:
            self._shadow = copy.deepcopy(self._model).requires_grad_(False)
        if self._shadow_version != version:
            self._shadow_version = None  # neither version while it changes
            try:
                take_on(self._shadow, self._store.tensors(self._store.manifest(version)))
            except VersionMissing as missing:
                raise Refusal(
                    f"old log-probs cannot be computed: {missing}, though tokens it sampled are inside "
                    f"learner.max_staleness. Was the store's folder changed by hand?",
                    ExitCode.DAMAGED,
                ) from None
            except (Damaged, ValueError) as damage:
                raise Refusal(
                    f"old log-probs cannot be computed: snapshot {version} is damaged: {damage}. Restore the store's "
                    f"folder from a copy, then start again with --resume",
                    ExitCode.DAMAGED,
                ) from None
            self._shadow_version = version
            self._loaded(version)
        return self._shadow


def _score(model: torch.nn.Module, batch: Padded, version: Version, values: Tensor) -> None:
    """Write this version's tokens into values [rows, tokens]."""
    places = places_of_version(batch.rows, version)
    if not places:
        return
    part = pad([batch.rows[place] for place in places]) if len(places) < len(batch.rows) else batch
    scored, _ = token_logprobs(
        model,
        torch.from_numpy(part.tokens).to(values.device),
        torch.from_numpy(part.temperatures).to(values.device),
    )
    own = torch.from_numpy(part.versions == version).to(values.device)
    length = part.tokens.shape[1]
    values[places, :length] = torch.where(own, scored, values[places, :length])
