"""Arrays [rows, longest row] of the loss, which packed passes have, too: bytes for each of their entries.

They are counted by running the learner's own code on one short row: its tensors for a batch, the corrections and the
objective of the run.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.plan.live_bytes import LiveBytes
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.corrections import Limits, correct
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.entropy import TURNS
from palimpsest.services.learner.losses.objective import Objective, Terms
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.proximal.types import Exact

ENTRIES = 4096
"""Entries of the row that is counted: so many that scalars do not show."""
TOKENS, PROXIMAL, ADVANTAGES = "tokens, masks, behavior log-probs", "proximal log-probs", "advantages"
START, CRITIC, AUDIT = "log-probs of version 0", "values and returns of the critic", "audited old log-probs"
VALUES, MASK = 4, 1
"""Bytes of a float32 and of a bool."""


@dataclass(frozen=True, slots=True)
class LossArrays:
    """Bytes for each entry of the rectangles of rows x longest row."""

    of_batch: dict[str, int]
    """Held for all rows of a version, until its last step."""
    of_results: int
    """Held for the rows of a minibatch, from its passes to its step: log-probs, entropies, weights, masks."""
    of_pass: int
    """Maximum of further tensors while the loss of one pass is computed."""


def loss_arrays(config: LearnerConfig) -> LossArrays:
    """Count the arrays of a run."""
    kind = PROXIMAL_KINDS[config.proximal.kind]
    of_batch = {TOKENS: _of_tokens(), PROXIMAL: 0 if kind.per_forward_pass else VALUES + MASK, ADVANTAGES: VALUES}
    if config.loss.kl.weight:
        of_batch[START] = VALUES
    if config.advantages.kind == "gae":
        of_batch[CRITIC] = 2 * VALUES
    if config.audit.fraction and not kind.exact:
        of_batch[AUDIT] = VALUES + MASK
    results, passing = _of_pass(config)
    return LossArrays({name: size for name, size in of_batch.items() if size}, results, passing)


def _of_tokens() -> int:
    """The tensors of a batch, with the places of packed rows."""
    row = Row(
        trajectory="", tokens=np.zeros(ENTRIES, np.int32), versions=np.full(ENTRIES, UNTRAINABLE, np.int32),
        behavior=np.zeros(ENTRIES, np.float32), temperature=1.0, advantage=0.0, reward=0.0, success=False,
    )  # fmt: skip
    own = on_device(pad([row]), torch.device("cpu"))
    return _entry([own.tokens, own.mask, own.behavior, own.rows.places, own.rows.positions])


def _of_pass(config: LearnerConfig) -> tuple[int, int]:
    """What a pass leaves for the step, and what the loss needs besides while it is computed."""
    objective = Objective(config, length=ENTRIES)
    current, entropy = (torch.full((1, ENTRIES), -1.0, requires_grad=True) for _ in range(2))
    behavior, values, advantages = (torch.full((1, ENTRIES), -1.0) for _ in range(3))
    mask = torch.ones(1, ENTRIES, dtype=torch.bool)
    shared = [torch.zeros_like(mask)]
    reference = values if config.loss.kl.weight else None
    with LiveBytes([current, entropy, behavior, values, advantages, mask, *shared]) as live:
        anchor = Exact([values], shared=shared).anchor(0, current.detach(), mask)
        correction = correct(
            anchor.logprobs, behavior, mask, missing=anchor.missing, rules=objective.rules,
            limits=Limits(m2_threshold=1.0),
        )  # fmt: skip
        if config.vcpo.baseline:
            advantages = torch.ones_like(behavior)
        inputs = Inputs(current, anchor.logprobs, behavior, correction.weight, advantages, mask)
        outcome = objective.outcome(inputs, multiplier=1.0, tau=1.0)
        loss = objective.loss(
            outcome, inputs, Terms(entropy, reference), Denominators.of([ENTRIES], ENTRIES),
            history=np.full(TURNS, np.nan),
        )  # fmt: skip
        loss.backward()  # type: ignore[no-untyped-call]
        peak = live.peak
    left = [current, entropy, *(getattr(anchor, name) for name in ("logprobs", "missing", "exact"))]
    left += [correction.weight, correction.masked, *correction.causes.values(), *outcome.clipped.values()]
    if config.vcpo.baseline:
        left.append(torch.empty_like(advantages))  # the advantages that follow from the baseline
    results = _entry(left)
    own = _entry([current, entropy])
    return results, max(0, peak // ENTRIES - (results - own))


def _entry(tensors: Iterable[Tensor]) -> int:
    """Bytes for each entry of tensors with ENTRIES of them, those that share memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return round(sum(storages.values()) / ENTRIES)
