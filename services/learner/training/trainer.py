"""Trains one version: computes the proximal log-probs, then does one optimizer step for each minibatch.

The proximal log-probs are computed before the first optimizer step, and all steps use them: the old log-prob of a token
belongs to the version that sampled it, and does not change with the number of minibatches.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad, partition_by_rank
from palimpsest.services.learner.corrections import Correction, Limits, correct, limits
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.entropy import phase_weight
from palimpsest.services.learner.losses.m2po import harmful_squares, m2po_tau
from palimpsest.services.learner.losses.objective import Objective, Terms, switch
from palimpsest.services.learner.losses.r2vpo import next_multiplier, squared_deviation
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.losses.vcpo import POWERS, ess, lr_factor, trajectory_log_ratio
from palimpsest.services.learner.model.critic import critic_optimizer
from palimpsest.services.learner.model.policy import score_batch, score_batch_and_entropy
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.types import Interpolated, ProximalValues
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training.accumulators import MicroBatchPass, StepAccumulator, TokenTotals
from palimpsest.services.learner.training.host_memory import trim_heap
from palimpsest.services.learner.training.min_variance_baseline import MinimumVarianceBaseline
from palimpsest.services.learner.training.preparation import VersionInputs, prepare_batch
from palimpsest.services.learner.training.results import MicroBatchResult, StepResult
from palimpsest.services.learner.training.row_guard import RowGuard
from palimpsest.services.learner.training.state import TrainingState


def no_cut() -> None:
    """Do nothing: no cut is needed before the weights change."""


class Trainer:
    """Trains on batches. Each rank has one trainer."""

    def __init__(
        self,
        policy: TrainablePolicy,
        state: TrainingState,
        ranks: ProcessGroup,
        config: LearnerConfig,
        *,
        length: int,
        seed: int,
    ) -> None:
        """length: sampling.max_trajectory_tokens; seed: with the version, it decides which batches are audited."""
        self._policy, self._state, self._ranks, self._config = policy, state, ranks, config
        self._length, self._seed = length, seed
        self._objective = Objective(config, length=length)
        self._device = next(policy.model.parameters()).device
        self._guard = RowGuard(policy.model, self._device)

    def configure(self, config: LearnerConfig) -> None:
        """Use other settings from the next version on. All ranks must call it before the same version."""
        self._config, self._objective = config, Objective(config, length=self._length)
        self._policy.configure(config.optimizer)
        if self._state.critic is not None:
            self._state.critic.trainable.configure(critic_optimizer(config))

    def train(
        self,
        minibatches: Sequence[Sequence[Row]],
        now: Version,
        *,
        before_first_step: Callable[[], None] = no_cut,
    ) -> StepResult:
        """Train on the rows of every minibatch. All ranks must call it with the same ones. Raises UserError (see
        Source).

        before_first_step: called when the gradients of the first minibatch are complete and no weight has changed yet.
        """
        mine = [self._micro_batches(minibatch) for minibatch in minibatches]
        batches = [batch for minibatch in mine for batch in minibatch]
        sums, timer = StepAccumulator(), PhaseTimer()
        with timer.of("proximal"):
            proximal = self._guard.call(lambda: self._state.source.proximal(batches, now), batches)
        with timer.of("audit"):
            old = self._guard.call(lambda: self._audit(batches, now), batches)
        with timer.of("prepare"):
            prepared = self._guard.call(
                lambda: prepare_batch(self._state, batches, self._config, self._ranks, self._device), batches
            )
        epo = self._config.loss.epo
        phase = 1.0 if isinstance(epo.phase, str) else phase_weight(now, epo.phase, epo.gamma)
        version = VersionInputs(batches, proximal, old, prepared, phase)
        results: list[MicroBatchResult] = []
        place = 0
        for number, (own, minibatch) in enumerate(zip(mine, minibatches, strict=True)):
            places = range(place, place + len(own))
            place += len(own)
            denominators = Denominators.of([row.trainable for row in minibatch], self._objective.length)
            loss_before = sums.loss
            with timer.of("passes"):
                bounds = self._limits(version, places)
                if self._config.loss.objective == "m2po":
                    sums.taus.append(self._tau(version, places, bounds, first=number == 0))
                groups = sorted({row.group for row in minibatch}) if self._config.vcpo.baseline else []
                passes = self._passes(version, places, groups, denominators, bounds, sums)
            results += [one.result(first=number == 0) for one in passes]
            if number == 0:
                with timer.of("cut"):
                    before_first_step()
            with timer.of("step"):
                if any(self._ranks.all_gather_object(sum(one.usable for one in passes))):
                    self._step(passes, sums)
                else:
                    sums.empty, sums.loss = sums.empty + 1, loss_before
                    self._discard_gradients()
            sums.normalizers.append(bounds.normalizer)
        totals = TokenTotals.summed(self._ranks.all_gather_object(TokenTotals.of(results, now, sums)))
        self._update_state(totals, now)
        if self._device.type == "cpu":
            trim_heap()
        return StepResult(
            results,
            method=proximal.method,
            loss=sums.mean_loss(len(minibatches)),
            grad_norm=sums.grad_norm,
            skipped=sums.skipped,
            active_share=totals.active_share,
            lr_factor=sums.lr_factor,
            baseline=sums.baseline,
            normalizer=sums.normalizer,
            seconds=timer.take(),
            gauges=self._state.gauges(self._policy.masters) | sums.gauges() | self._divergence(totals),
            empty=sums.empty,
            missed=self._missed(),
            rejected=self._guard.take(),
        )

    def _micro_batches(self, minibatch: Sequence[Row]) -> list[PaddedBatch]:
        """This rank's share of a minibatch."""
        share = partition_by_rank(minibatch, self._ranks.size)[self._ranks.rank]
        if self._config.vcpo.baseline:  # one trajectory for each pass, group after group
            share = sorted(share, key=lambda row: (row.group, len(row.tokens), row.trajectory))
            return [pad([row]) for row in share]
        return [pad(rows) for rows in micro_batches(share, max_tokens=self._config.micro_batch_tokens)]

    def _audit(self, batches: Sequence[PaddedBatch], now: Version) -> list[Tensor] | None:
        """Return old log-probs if this version is audited, else None. NaN marks tokens that could not be scored."""
        auditor, fraction = self._state.auditor, self._config.audit.fraction
        if auditor is None or np.random.default_rng([self._seed, now]).random() >= fraction:
            return None
        exact = auditor.proximal(batches, now)
        known = []
        for place, batch in enumerate(batches):
            mask = torch.from_numpy(batch.mask).to(self._device)
            anchor = exact.anchor(place, torch.zeros(mask.shape, device=self._device), mask)
            known.append(torch.where(anchor.exact, anchor.logprobs, torch.nan).cpu())
        return known

    def _limits(self, version: VersionInputs, places: range) -> Limits:
        """Compute the limits that depend on all tokens of a minibatch, before its forward passes."""
        rules = self._objective.rules
        if isinstance(version.proximal, Interpolated) or (rules.m2 is None and not rules.weight_normalize):
            return Limits()
        parts = []
        for place in places:
            mask, behavior = self._on_device(version.batches[place].mask, version.batches[place].behavior)
            anchor = version.proximal.anchor(place, behavior, mask)
            parts.append((anchor.logprobs, behavior, mask, anchor.missing))
        return limits(parts, rules, gather=self._ranks.all_gather_object)

    def _tau(self, version: VersionInputs, places: range, bounds: Limits, *, first: bool) -> float:
        """M2PO's tau of a minibatch, from the current log-probs of all its tokens before the first backward pass."""
        squares = [torch.empty(0, dtype=torch.float64)]
        for place in places:
            if first and version.proximal.method == "current_recompute":
                current = version.proximal.anchor(place, torch.empty(0), torch.empty(0)).logprobs
            else:
                with torch.no_grad():
                    current = self._guard.forward(score_batch, version.batches, place)
            inputs, _, _ = self._inputs(version, place, current, bounds)
            squares.append(harmful_squares(inputs).cpu())
        return m2po_tau(torch.cat(squares), self._config.loss.m2po.budget, gather=self._ranks.all_gather_object)

    def _passes(
        self,
        version: VersionInputs,
        places: range,
        groups: Sequence[str],
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
    ) -> list[MicroBatchPass]:
        """Forward and backward passes of a minibatch's micro-batches. groups: of all ranks, with VCPO's baseline."""
        if self._config.vcpo.baseline:
            return self._passes_with_baseline(version, places, groups, denominators, bounds, sums)
        passes = []
        for place in places:
            passes.append(self._pass(version, place, denominators, bounds, sums))
            self._train_critic(version, place, denominators)
        return passes

    def _passes_with_baseline(
        self,
        version: VersionInputs,
        places: range,
        groups: Sequence[str],
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
    ) -> list[MicroBatchPass]:
        """One pass for each trajectory, with the minimum-variance baseline of each group."""
        baseline = MinimumVarianceBaseline(self._policy)
        passes = []
        for group in groups:
            of_group = []
            for place in (place for place in places if version.batches[place].rows[0].group == group):
                of_group.append(self._pass(version, place, denominators, bounds, sums))
                baseline.add(version.batches[place].rows[0].reward)
            sums.baselines.append(baseline.end_group(self._ranks))
            for one in of_group:
                one.advantages = torch.full_like(one.advantages, one.batch.rows[0].reward - sums.baselines[-1])
            passes += of_group
        baseline.settle(self._ranks)
        return passes

    def _inputs(
        self, version: VersionInputs, place: int, current: Tensor, bounds: Limits
    ) -> tuple[Inputs, ProximalValues, Correction]:
        """Inputs of the objective for one micro-batch. current: log-probs of the policy."""
        batch = version.batches[place]
        mask, behavior = self._on_device(batch.mask, batch.behavior)
        anchor = version.proximal.anchor(place, current.detach(), mask)
        correction = correct(
            anchor.logprobs, behavior, mask, missing=anchor.missing, rules=self._objective.rules, limits=bounds
        )
        vcpo = self._config.vcpo.baseline
        advantages = torch.ones_like(behavior) if vcpo else version.prepared.advantages[place]
        return Inputs(current, anchor.logprobs, behavior, correction.weight, advantages, mask), anchor, correction

    def _pass(
        self, version: VersionInputs, place: int, denominators: Denominators, bounds: Limits, sums: StepAccumulator
    ) -> MicroBatchPass:
        """Forward and backward pass of one micro-batch."""
        current, entropy = self._guard.forward(score_batch_and_entropy, version.batches, place)
        batch, prepared = version.batches[place], version.prepared
        inputs, anchor, correction = self._inputs(version, place, current, bounds)
        tau = sums.taus[-1] if sums.taus else 0.0
        outcome = self._objective.outcome(inputs, multiplier=self._state.multiplier, tau=tau)
        loss = self._objective.loss(
            outcome,
            inputs,
            Terms(entropy, prepared.reference[place] if prepared.reference else None),
            denominators,
            history=self._state.entropies.turns(self._config.loss.epo.history),
            phase=version.phase,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        if prepared.reference and self._config.loss.kl.place == "loss":
            with torch.no_grad():
                sums.divergence += float(self._objective.divergence(inputs, prepared.reference[place]).double().sum())
        sums.add_pass(loss, squared_deviation(outcome.log_update), inputs.usable)
        old = None if version.old is None else version.old[place]
        removed = outcome.clipped.get("opsm")
        usable = int((inputs.usable if removed is None else inputs.usable & ~removed).sum())
        return MicroBatchPass(
            batch, anchor, inputs, entropy.detach(), correction, outcome.clipped, old, inputs.advantages, usable
        )

    def _train_critic(self, version: VersionInputs, place: int, denominators: Denominators) -> None:
        """Backward pass of the critic on one micro-batch, if there is a critic."""
        if self._state.critic is None:
            return
        tokens, mask = self._on_device(version.batches[place].tokens, version.batches[place].mask)
        loss = self._state.critic.loss(
            tokens,
            mask,
            version.prepared.returns[place],
            version.prepared.values[place],
            clip=switch(self._config.advantages.critic.clip),
            denominator=float(max(1, denominators.tokens)),
        )
        loss.backward()  # type: ignore[no-untyped-call]

    def _step(self, passes: Sequence[MicroBatchPass], sums: StepAccumulator) -> None:
        """One optimizer step, all ranks together."""
        config = self._config.vcpo
        factor = 1.0
        if config.lr_scaling != "off":
            inputs = [one.inputs for one in passes]
            ratios = [
                trajectory_log_ratio(one.current, one.behavior, one.mask)[one.mask.any(-1)].cpu() for one in inputs
            ]
            share = ess(torch.cat([torch.empty(0, dtype=torch.float64), *ratios]), gather=self._ranks.all_gather_object)
            factor = lr_factor(share, config.base, POWERS[config.lr_scaling])
        sums.lr_factors.append(factor)
        if not config.baseline:  # the baseline has summed them over the ranks
            self._ranks.all_reduce_sum(self._policy.gradients())
        sums.norms.append(self._policy.step(lr_factor=factor))
        if self._state.critic is not None:
            self._ranks.all_reduce_sum(self._state.critic.gradients())
            self._state.critic.step()

    def _divergence(self, totals: TokenTotals) -> dict[str, float]:
        """Mean penalty KL(current || start) of the usable tokens, nats, if it is in the loss."""
        kl = self._config.loss.kl
        return {"kl_start": totals.mean_divergence} if kl.weight and kl.place == "loss" else {}

    def _discard_gradients(self) -> None:
        """Set all gradients to zero. Weights, moments, schedule and step count do not change.

        AdamW would otherwise move the weights by momentum and decay, although the minibatch has no usable token.
        """
        for gradient in self._policy.gradients():
            gradient.zero_()
        if self._state.critic is not None:
            for gradient in self._state.critic.gradients():
                gradient.zero_()

    def _update_state(self, totals: TokenTotals, now: Version) -> None:
        """Update the training state from the totals of a version. Every rank has the same totals and computes the
        same."""
        state, r2vpo = self._state, self._config.loss.r2vpo
        if state.stateful_source is not None:
            state.stateful_source.published(
                self._policy.masters,
                active_share=totals.active_share,
                mean_staleness=totals.mean_staleness,
                unmasked_share=totals.unmasked_share,
                version=Version(now + 1),
            )
        state.multiplier = next_multiplier(state.multiplier, totals.mean_squared_deviation, r2vpo.target, r2vpo.rate)
        if totals.mean_entropy is not None:
            state.entropies.add(totals.mean_entropy, totals.mean_turns)

    def _missed(self) -> dict[str, int]:
        """ "reason/policy" -> tokens of all ranks without an old log-prob."""
        missed: dict[str, int] = {}
        for part in self._ranks.all_gather_object(self._state.misses.take()):
            for (reason, policy), tokens in part.items():
                missed[f"{reason}/{policy}"] = missed.get(f"{reason}/{policy}", 0) + tokens
        return missed

    def _on_device(self, *arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(self._device) for array in arrays]
