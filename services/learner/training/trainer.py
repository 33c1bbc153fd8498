"""One version's training: the reference pass, then one optimizer step for each minibatch.

The reference pass comes before the first optimizer step and is used by all of them: the clip anchor of a token is its
own version, however many minibatches there are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad, partition_by_rank
from palimpsest.services.learner.corrections import Correction, Limits, correct, limits
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.objective import Objective, Terms, switch
from palimpsest.services.learner.losses.r2vpo import next_multiplier, squared_deviation
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.losses.vcpo import POWERS, ess, lr_factor, trajectory_log_ratio
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.types import Interpolated, Proximal, ProximalValues
from palimpsest.services.learner.training.min_variance_baseline import MinimumVarianceBaseline
from palimpsest.services.learner.training.preparation import Prepared, prepare_batch
from palimpsest.services.learner.training.results import MicroBatchResult, StepResult, counts, mean_entropies
from palimpsest.services.learner.training.state import TrainingState


def no_cut() -> None:
    """No cut is needed before the weights change."""


@dataclass
class _Sums:
    """Over the minibatches of a version, on this rank."""

    loss: float = 0.0
    norms: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)
    normalisers: list[float] = field(default_factory=list)
    squares: float = 0.0
    """Sum of (r - 1)^2 over usable tokens."""
    usable: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the block's seconds under this name."""
        started = time.monotonic()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - started


class Trainer:
    """Trains on batches; one for each rank."""

    def __init__(
        self,
        trainee: TrainablePolicy,
        companions: TrainingState,
        ranks: ProcessGroup,
        config: LearnerConfig,
        *,
        length: int,
        seed: int,
    ) -> None:
        """length: sampling.max_trajectory_tokens; seed: decides, with the version, which batches are audited."""
        self._trainee, self._companions, self._ranks, self._config = trainee, companions, ranks, config
        self._objective = Objective(config, length=length)
        self._seed = seed
        self._device = next(trainee.model.parameters()).device

    def train(
        self,
        minibatches: Sequence[Sequence[Row]],
        now: Version,
        *,
        before_first_step: Callable[[], None] = no_cut,
    ) -> StepResult:
        """Train on the rows of every minibatch; all ranks call it with the same ones. Raises UserError from the source.

        before_first_step: called when the first minibatch's gradients are there and nothing has changed yet.
        """
        most = 1 if self._config.vcpo.baseline else self._config.micro_batch_tokens
        mine = [
            [
                pad(rows)
                for rows in micro_batches(
                    partition_by_rank(minibatch, self._ranks.size)[self._ranks.rank], max_tokens=most
                )
            ]
            for minibatch in minibatches
        ]
        flat = [batch for batches in mine for batch in batches]
        sums = _Sums()
        with sums.timed("proximal"):
            proximal = self._companions.source.proximal(flat, now)
        with sums.timed("audit"):
            old = self._audited(flat, now)
        with sums.timed("prepare"):
            prepared = prepare_batch(self._companions, flat, self._config, self._ranks, self._device)
        scored: list[MicroBatchResult] = []
        place = 0
        for number, (batches, minibatch) in enumerate(zip(mine, minibatches, strict=True)):
            places = range(place, place + len(batches))
            place += len(batches)
            denominators = Denominators.of([row.trainable for row in minibatch], self._objective.length)
            with sums.timed("passes"):
                bounds = self._limits(proximal, flat, places)
                parts = self._passes(flat, places, proximal, old, prepared, denominators, bounds, sums)
            scored += [self._result(part, first=number == 0) for part in parts]
            if number == 0:
                with sums.timed("cut"):
                    before_first_step()
            with sums.timed("step"):
                self._step(parts, sums)
            sums.normalisers.append(bounds.normaliser)
        return self._finished(scored, proximal, len(minibatches), sums, now)

    def _audited(self, batches: Sequence[PaddedBatch], now: Version) -> list[Tensor] | None:
        """Exact values beside a surrogate's, for the share of the batches that is audited."""
        auditor, fraction = self._companions.auditor, self._config.audit.fraction
        if auditor is None or np.random.default_rng([self._seed, now]).random() >= fraction:
            return None
        exact = auditor.proximal(batches, now)
        known = []
        for place, batch in enumerate(batches):
            mask = torch.from_numpy(batch.mask).to(self._device)
            anchor = exact.anchor(place, torch.zeros(mask.shape, device=self._device), mask)
            known.append(torch.where(anchor.exact, anchor.logprobs, torch.nan).cpu())
        return known

    def _limits(self, proximal: Proximal, batches: Sequence[PaddedBatch], places: range) -> Limits:
        """What a rule must know of the whole minibatch before its forward passes."""
        rules = self._objective.rules
        if isinstance(proximal, Interpolated) or (rules.m2 is None and not rules.weight_normalise):
            return Limits()
        parts = []
        for place in places:
            mask, behavior = self._on_device(batches[place].mask, batches[place].behavior)
            anchor = proximal.anchor(place, behavior, mask)
            parts.append((anchor.logprobs, behavior, mask, anchor.missing))
        return limits(parts, rules, gather=self._ranks.all_gather_object)

    def _passes(
        self,
        batches: Sequence[PaddedBatch],
        places: range,
        proximal: Proximal,
        old: list[Tensor] | None,
        prepared: Prepared,
        denominators: Denominators,
        bounds: Limits,
        sums: _Sums,
    ) -> "list[_Part]":
        """Forward and backward of every micro-batch of a minibatch."""
        single = MinimumVarianceBaseline(self._trainee) if self._config.vcpo.baseline else None
        parts = []
        for place in places:
            part = self._pass(batches[place], place, proximal, prepared, denominators, bounds, sums)
            part.old = old[place] if old is not None else None
            parts.append(part)
            if single is not None:
                single.add(batches[place].rows[0].reward)
            if self._companions.critic is not None:
                self._companions.critic.loss(
                    self._on_device(batches[place].tokens)[0],
                    part.inputs.mask,
                    prepared.returns[place],
                    prepared.values[place],
                    clip=switch(self._config.advantages.critic.clip),
                    denominator=float(max(1, denominators.tokens)),
                ).backward()  # type: ignore[no-untyped-call]
        if single is not None:
            sums.baselines.append(single.settle(self._ranks))
        return parts

    def _pass(
        self,
        batch: PaddedBatch,
        place: int,
        proximal: Proximal,
        prepared: Prepared,
        denominators: Denominators,
        bounds: Limits,
        sums: _Sums,
    ) -> "_Part":
        """Forward and backward of one micro-batch."""
        mask, behavior = self._on_device(batch.mask, batch.behavior)
        current, entropy = score_batch(self._trainee.model, batch, self._device)
        anchor = proximal.anchor(place, current.detach(), mask)
        correction = correct(
            anchor.logprobs, behavior, mask, missing=anchor.missing, rules=self._objective.rules, limits=bounds
        )
        advantages = torch.ones_like(behavior) if self._config.vcpo.baseline else prepared.advantages[place]
        inputs = Inputs(current, anchor.logprobs, behavior, correction.weight, advantages, mask)
        outcome = self._objective.outcome(inputs, multiplier=self._companions.multiplier)
        loss = self._objective.loss(
            outcome,
            inputs,
            Terms(entropy, prepared.reference[place] if prepared.reference else None),
            denominators,
            history=self._companions.entropies.mean,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        sums.loss += float(loss.detach())
        usable = inputs.usable
        sums.squares += float(squared_deviation(outcome.log_update)[usable].double().sum())
        sums.usable += int(usable.sum())
        return _Part(batch, anchor, inputs, entropy.detach(), correction, outcome.clipped)

    def _step(self, parts: "Sequence[_Part]", sums: _Sums) -> None:
        """One optimizer step, all ranks together."""
        config = self._config.vcpo
        factor = 1.0
        if config.lr_scaling != "off":
            ratios = [
                trajectory_log_ratio(p.inputs.current, p.inputs.behavior, p.inputs.mask)[p.inputs.mask.any(-1)].cpu()
                for p in parts
            ]
            share = ess(torch.cat([torch.empty(0, dtype=torch.float64), *ratios]), gather=self._ranks.all_gather_object)
            factor = lr_factor(share, config.base, POWERS[config.lr_scaling])
        sums.factors.append(factor)
        if not config.baseline:  # else they are summed already
            self._ranks.all_reduce_sum(self._trainee.gradients())
        sums.norms.append(self._trainee.step(lr_factor=factor))
        if self._companions.critic is not None:
            self._ranks.all_reduce_sum(self._companions.critic.gradients())
            self._companions.critic.step()

    def _finished(
        self, scored: list[MicroBatchResult], proximal: Proximal, minibatches: int, sums: _Sums, now: Version
    ) -> StepResult:
        """Everything that follows from the version as a whole, on every rank alike."""
        own = (*counts(scored, now), sums.squares, sums.usable, *mean_entropies(scored))
        totals = [sum(values) for values in zip(*self._ranks.all_gather_object(own), strict=True)]
        tokens, active, age, squares, usable, entropy, trajectories = totals
        share, staleness = (active / tokens, age / tokens) if tokens else (float("nan"), float("nan"))
        companions, r2vpo = self._companions, self._config.loss.r2vpo
        if companions.follower is not None:
            companions.follower.published(self._trainee.masters, active_share=share, mean_staleness=staleness)
        mean_square = squares / usable if usable else float("nan")
        companions.multiplier = next_multiplier(companions.multiplier, mean_square, r2vpo.target, r2vpo.rate)
        if trajectories:
            companions.entropies.add(entropy / trajectories)
        missed: dict[str, int] = {}
        for part in self._ranks.all_gather_object(companions.misses.take()):
            for (why, policy), number in part.items():
                missed[f"{why}/{policy}"] = missed.get(f"{why}/{policy}", 0) + number
        finite = [norm for norm in sums.norms if norm == norm and norm != float("inf")]
        return StepResult(
            scored,
            method=proximal.method,
            loss=sums.loss / minibatches,
            grad_norm=max(finite, default=float("nan")),
            skipped=len(sums.norms) - len(finite),
            active_share=share,
            lr_factor=min(sums.factors),
            baseline=sum(sums.baselines) / len(sums.baselines) if sums.baselines else None,
            normaliser=sum(sums.normalisers) / len(sums.normalisers),
            seconds=sums.seconds,
            gauges=companions.gauges(self._trainee.masters),
            missed=missed,
        )

    def _result(self, part: "_Part", *, first: bool) -> MicroBatchResult:
        anchor = part.anchor
        return MicroBatchResult(
            batch=part.batch,
            anchor=ProximalValues(anchor.logprobs.cpu(), anchor.missing.cpu(), anchor.exact.cpu()),
            current=part.inputs.current.detach().cpu(),
            entropy=part.entropy.cpu(),
            correction=part.correction.cpu(),
            clipped={cause: where.cpu() for cause, where in part.clipped.items()},
            advantages=part.inputs.advantages.cpu(),
            old=part.old,
            first=first,
        )

    def _on_device(self, *arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(self._device) for array in arrays]


@dataclass(eq=False)
class _Part:
    """A micro-batch between its passes and the step."""

    batch: PaddedBatch
    anchor: ProximalValues
    inputs: Inputs
    entropy: Tensor
    correction: Correction
    clipped: dict[str, Tensor]
    old: Tensor | None = None
