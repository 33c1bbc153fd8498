"""Trains the toy with the correction and the objective of the learner.

Passive: exact old log-probs train, and every reference is applied to the same tokens, so differences come from the
references alone. Active: each reference trains by itself.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.mismatch.measures import Part, RunTokens, TokenStatistics
from bench.mismatch.references import CPU, DECAYS, EXACT, REFERENCES, Stored, masters, source
from bench.mismatch.toy import Batch, Policy, Store, Toy, new_policy, sample
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.corrections import Limits, Rules, correct
from palimpsest.services.learner.losses.aggregate import Denominators, aggregate
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.types import Inputs, Outcome
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.observability.surrogate_error import AuditedTokens, Thresholds
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.types import Exact, Proximal, Source, Surrogate

WEIGHT_BOUND = 5.0
"""Upper bound of the weights (discrepancies)."""
LAST = 25
"""Number of last versions in the mean of the final reward."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training of the toy by one reference."""

    toy: Toy
    reference: str
    thresholds: Thresholds
    seed: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Result of a run."""

    rewards: list[float]
    """Mean reward of each version."""
    masked: float
    """Share of all trainable tokens."""
    clipped: float
    """Share of all trainable tokens that are clipped and not masked."""
    resets: int
    seconds: float
    """CPU time."""
    proximal_seconds: float
    """CPU time of the reference."""

    @property
    def final_reward(self) -> float:
        """Mean of the last versions."""
        return float(np.mean(self.rewards[-LAST:]))


class Judged(NamedTuple):
    """Correction and objective of a minibatch under one reference. Arrays are [rows, tokens]."""

    anchor: Tensor
    """Log-probs of the reference, nats."""
    outcome: Outcome
    masked: Tensor
    clipped: Tensor
    """bool: the clip removes the gradient of the token. Masked tokens are not included."""


def judge(batch: PaddedBatch, current: Tensor, proximal: Proximal, place: int, thresholds: Thresholds) -> Judged:
    """Return correction and objective of a minibatch. current: [rows, tokens], nats, with gradient for training."""
    if thresholds.clip_low is None or thresholds.clip_high is None:
        raise ValueError("the objective has a clip: give clip_low and clip_high")
    mask, behavior = torch.from_numpy(batch.mask), torch.from_numpy(batch.behavior)
    anchor = proximal.anchor(place, current.detach(), mask)
    rules = Rules(weight="truncated", weight_high=WEIGHT_BOUND, band=thresholds.band)
    correction = correct(anchor.logprobs, behavior, mask, missing=anchor.missing, rules=rules, limits=Limits())
    advantages = torch.from_numpy(batch.advantages)
    inputs = Inputs(current, anchor.logprobs, behavior, correction.weight, advantages, mask)
    outcome = ppo_loss(inputs, clip_low=thresholds.clip_low, clip_high=thresholds.clip_high)
    return Judged(anchor.logprobs, outcome, correction.masked, outcome.touched)


def current_logprobs(policy: Policy, batch: PaddedBatch) -> Tensor:
    """Return the log-probs of the policy with gradient. [rows, tokens], nats"""
    return token_logprobs(policy, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures))


class Trainer:
    """Policy, optimizer, versions, and a random generator that is the same for every run with this seed."""

    def __init__(self, toy: Toy, seed: int) -> None:
        self.toy, self.now = toy, Version(0)
        self.policy = new_policy(toy, seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=toy.learning_rate, fused=True)
        self.store = Store(self.policy, window=toy.window, levels=toy.levels)
        self.store.publish(self.now, self.policy)
        self._random = np.random.default_rng(seed)

    def sample(self) -> Batch:
        """Return the batch of the next version."""
        return sample(self.store, self.toy, self.now, self._random)

    def step(self, batch: PaddedBatch, judged: Judged) -> None:
        """Take one optimizer step."""
        mask = torch.from_numpy(batch.mask)
        denominators = Denominators(tokens=int(mask.sum()), sequences=len(mask), length=mask.shape[1])
        loss = aggregate(judged.outcome.losses, mask, "token_mean", denominators)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def publish(self) -> None:
        """Publish the next version to the store."""
        self.now = Version(self.now + 1)
        self.store.publish(self.now, self.policy)


@dataclass(slots=True)
class Shares:
    """Counts of trainable, masked and clipped tokens."""

    tokens: int = 0
    masked: int = 0
    clipped: int = 0
    staleness: int = 0
    """Sum over the tokens, versions."""

    def add(self, batch: PaddedBatch, judged: Judged, now: Version) -> None:
        """Add the counts of a minibatch."""
        self.tokens += int(batch.mask.sum())
        self.masked += int(judged.masked.sum())
        self.clipped += int(judged.clipped.sum())
        self.staleness += int((now - batch.versions[batch.mask]).sum())


def train(run: Run) -> Finished:
    """Return the result of an active run."""
    began, proximal_seconds = time.process_time(), 0.0
    trainer = Trainer(run.toy, run.seed)
    reference = source(run.reference, store=trainer.store, policy=trainer.policy, toy=run.toy)
    rewards, shares = [], []
    while trainer.now < run.toy.versions:
        batch = trainer.sample()
        rewards.append(float(batch.rewards.mean()))
        proximal_began = time.process_time()
        proximal = reference.proximal(batch.minibatches, trainer.now)
        proximal_seconds += time.process_time() - proximal_began
        shares.append(Shares())
        for place, minibatch in enumerate(batch.minibatches):
            current = current_logprobs(trainer.policy, minibatch)
            judged = judge(minibatch, current, proximal, place, run.thresholds)
            shares[-1].add(minibatch, judged, trainer.now)
            trainer.step(minibatch, judged)
        trainer.publish()
        follow(reference, trainer.policy, shares[-1])
    tokens = sum(share.tokens for share in shares)
    return Finished(
        rewards,
        masked=sum(share.masked for share in shares) / tokens,
        clipped=sum(share.clipped for share in shares) / tokens,
        resets=resets(reference),
        seconds=time.process_time() - began,
        proximal_seconds=proximal_seconds,
    )


def follow(reference: Source, policy: Policy, shares: Shares) -> None:
    """Pass the trained version to a moving average."""
    if isinstance(reference, EwmaProx | PpoEwmaAsync):
        reference.published(
            masters(policy),
            active_share=1 - (shares.masked + shares.clipped) / shares.tokens,
            mean_staleness=shares.staleness / shares.tokens,
        )


def resets(reference: Source) -> int:
    """Return the resets of the moving average; 0 for other references."""
    return sum(reference.resets.values()) if isinstance(reference, PpoEwmaAsync) else 0


@dataclass(frozen=True, slots=True)
class Observed:
    """Result of a passive run."""

    references: dict[str, TokenStatistics]
    leaks: dict[float, float]
    """Decay -> mean |average - old| of a moving average of that decay, nats."""


def observe(toy: Toy, thresholds: Thresholds, seed: int) -> Observed:
    """Return the result of a passive run. Excludes versions whose tokens do not have every staleness."""
    trainer = Trainer(toy, seed)
    policy = trainer.policy
    exact = Stored(trainer.store)
    references = {name: source(name, store=trainer.store, policy=policy, toy=toy) for name in REFERENCES}
    averages = {decay: EwmaProx(policy, masters(policy), CPU, decay=decay) for decay in DECAYS}
    collected = {name: RunTokens() for name in REFERENCES}
    leaks: dict[float, list[Tensor]] = {decay: [] for decay in DECAYS}
    while trainer.now < toy.versions:
        batch, counts = trainer.sample(), trainer.now >= toy.window
        old = exact.proximal(batch.minibatches, trainer.now)
        proximals = {name: each.proximal(batch.minibatches, trainer.now) for name, each in references.items()}
        if counts:
            for decay, average in averages.items():
                leaks[decay] += _leaks(average.proximal(batch.minibatches, trainer.now), old, batch)
        shares = {name: Shares() for name in REFERENCES}
        for place, minibatch in enumerate(batch.minibatches):
            current = current_logprobs(policy, minibatch)
            for name, proximal in proximals.items():
                judged = judge(minibatch, current.detach(), proximal, place, thresholds)
                shares[name].add(minibatch, judged, trainer.now)
                if counts:
                    part = _part(minibatch, trainer.now, current, old.logprobs[place], judged, first=place == 0)
                    collected[name].parts.append(part)
            trainer.step(minibatch, judge(minibatch, current, old, place, thresholds))
        trainer.publish()
        for name, each in references.items():
            follow(each, policy, shares[name])
        for average in averages.values():
            follow(average, policy, shares[EXACT])
    return Observed(
        {name: parts.statistics() for name, parts in collected.items()},
        {decay: float(torch.cat(values).mean()) for decay, values in leaks.items()},
    )


def _leaks(average: Surrogate, old: Exact, batch: Batch) -> list[Tensor]:
    """Return |average - old| of the trainable tokens of each minibatch, nats."""
    masks = [torch.from_numpy(minibatch.mask) for minibatch in batch.minibatches]
    both = zip(average.logprobs, old.logprobs, masks, strict=True)
    return [(guess - true).abs()[mask] for guess, true, mask in both]


def _part(batch: PaddedBatch, now: Version, current: Tensor, old: Tensor, judged: Judged, *, first: bool) -> Part:
    mask = batch.mask
    tokens = AuditedTokens(
        staleness=now - batch.versions[mask],
        behavior=batch.behavior[mask],
        surrogate=judged.anchor.numpy()[mask],
        old=old.numpy()[mask],
        current=current.detach().numpy()[mask],
        advantages=batch.advantages[mask],
    )
    return Part(tokens, np.nonzero(mask)[1], judged.masked.numpy()[mask], judged.clipped.numpy()[mask], first)
