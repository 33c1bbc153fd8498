"""One version's training: old log-probs, then one optimizer step for each minibatch.

The reference pass comes before the first optimizer step and is used by all of them: the clip anchor of a token is its
own version, however many minibatches there are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.learner import LearnerConfig
from common.versions import Version
from services.learner.batching import Padded, Row, deal, micro_batches, pad
from services.learner.corrections import Correction, discrepancy_band
from services.learner.losses.clipped import clipped_loss
from services.learner.model import Trainee, token_logprobs
from services.learner.proximal import Exact, Proximal, Source
from services.learner.ranks import Ranks
from services.learner.statistics import Tokens


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch with everything that was computed for it; tensors are [rows, tokens] float32 on the CPU."""

    batch: Padded
    proximal: Tensor
    current: Tensor
    """Before the minibatch's optimizer step."""
    entropy: Tensor
    correction: Correction
    clipped: Tensor
    first: bool
    """Whether it belongs to the first minibatch: current is then the version just published."""

    def tokens(self, now: Version) -> Tokens:
        """Its trainable tokens, flat."""
        mask = torch.from_numpy(self.batch.mask)
        return Tokens(
            staleness=(now - torch.from_numpy(self.batch.versions))[mask].numpy(),
            behavior=torch.from_numpy(self.batch.behavior)[mask].numpy(),
            proximal=self.proximal[mask].numpy(),
            current=self.current[mask].numpy(),
            entropy=self.entropy[mask].numpy(),
            advantages=torch.from_numpy(self.batch.advantages)[mask].numpy(),
            masked=self.correction.masked[mask].numpy(),
            clipped=self.clipped[mask].numpy(),
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """What a version's training did on this rank."""

    scored: list[Scored]
    exact: bool
    loss: float
    grad_norm: float
    """Largest over the minibatches, before clipping."""
    skipped: int
    """Minibatches whose gradient was not finite."""


def train(
    trainee: Trainee,
    source: Source,
    ranks: Ranks,
    minibatches: Sequence[Sequence[Row]],
    now: Version,
    *,
    config: LearnerConfig,
) -> Trained:
    """Train on the rows of every minibatch; all ranks call it with the same ones. Raises Refusal from the source."""
    mine = [
        [
            pad(rows)
            for rows in micro_batches(deal(minibatch, ranks.size)[ranks.rank], max_tokens=config.micro_batch_tokens)
        ]
        for minibatch in minibatches
    ]
    proximal = source.proximal([batch for batches in mine for batch in batches], now)
    places = itertools.count()
    scored: list[Scored] = []
    losses, norms = 0.0, []
    for number, (batches, minibatch) in enumerate(zip(mine, minibatches, strict=True)):
        denominator = float(max(1, sum(row.trainable for row in minibatch)))
        for batch in batches:
            loss, result = _pass(trainee, batch, proximal, next(places), denominator, config, first=number == 0)
            losses += loss
            scored.append(result)
        ranks.sum(trainee.gradients())
        norms.append(trainee.step())
    finite = [norm for norm in norms if norm == norm and norm != float("inf")]
    return Trained(
        scored,
        exact=isinstance(proximal, Exact),
        loss=losses / len(minibatches),
        grad_norm=max(finite, default=float("nan")),
        skipped=len(norms) - len(finite),
    )


def _pass(
    trainee: Trainee,
    batch: Padded,
    source: Proximal,
    place: int,
    denominator: float,
    config: LearnerConfig,
    *,
    first: bool,
) -> tuple[float, Scored]:
    """Forward and backward of one micro-batch; its share of the loss."""
    device = next(trainee.model.parameters()).device
    mask = torch.from_numpy(batch.mask).to(device)
    current, entropy = token_logprobs(
        trainee.model,
        torch.from_numpy(batch.tokens).to(device),
        torch.from_numpy(batch.temperatures).to(device),
    )
    proximal = source.anchor(place, current.detach(), mask).logprobs
    discrepancy, objective = config.discrepancy, config.loss
    correction = discrepancy_band(
        proximal,
        torch.from_numpy(batch.behavior).to(device),
        mask,
        band=2.0 if discrepancy.band == "off" else discrepancy.band,
        use_mask=discrepancy.band != "off",
        use_weight=discrepancy.weight != "off",
    )
    result = clipped_loss(
        current,
        proximal,
        correction.weight,
        torch.from_numpy(batch.advantages).to(device),
        mask,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        denominator=denominator,
    )
    loss = result.loss
    if objective.entropy:
        loss = loss - objective.entropy * torch.where(mask, entropy, torch.zeros((), device=device)).sum() / denominator
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), Scored(
        batch,
        proximal.cpu(),
        current.detach().cpu(),
        entropy.detach().cpu(),
        Correction(correction.weight.cpu(), correction.masked.cpu()),
        result.clipped.cpu(),
        first,
    )
