"""Trains one version: computes the proximal log-probs, then does one optimizer step for each minibatch.

The proximal log-probs are computed before the first optimizer step, and all steps use them: the old log-prob of a token
belongs to the version that sampled it, and does not change with the number of minibatches.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import (
    PaddedBatch,
    Row,
    empty_batch,
    micro_batches,
    pad,
    partition_by_rank,
)
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.entropy import phase_weight
from palimpsest.services.learner.losses.objective import Objective
from palimpsest.services.learner.losses.r2vpo import next_multiplier
from palimpsest.services.learner.losses.vcpo import POWERS, ess, lr_factor, trajectory_log_ratio
from palimpsest.services.learner.model.critic import critic_optimizer
from palimpsest.services.learner.model.packing import packs_rows
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.types import Proximal, replay_routes
from palimpsest.services.learner.sharding.sharded_model import device_of
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training.accumulators import MicroBatchPass, StepAccumulator, TokenTotals
from palimpsest.services.learner.training.host_memory import HeapTrimmer
from palimpsest.services.learner.training.min_variance_baseline import rows_in_turn
from palimpsest.services.learner.training.passes import Passes
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
        self._device = device_of(policy.model)
        self._guard, self._heap = RowGuard(policy.model, self._device, ranks), HeapTrimmer()
        self._passes = self._make_passes()

    def configure(self, config: LearnerConfig) -> None:
        """Use other settings from the next version on. All ranks must call it before the same version."""
        self._config, self._objective = config, Objective(config, length=self._length)
        self._passes = self._make_passes()
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
        sums, timer = StepAccumulator(), PhaseTimer(base="summary")
        with timer.of("prepare"):
            mine = [self._micro_batches(minibatch) for minibatch in minibatches]
            batches = [batch for minibatch in mine for batch in minibatch]
        fresh = self._fresh(mine)
        with timer.of("proximal"):
            proximal = self._guard.call(
                lambda: self._state.source.proximal(batches, now, fresh),
                batches,
                undo=partial(self._state.misses.restore, self._state.misses.tokens.copy()),
            )
        with timer.of("audit"):
            audit = self._guard.call(lambda: self._audit(batches, now, fresh), batches)
        with timer.of("prepare"):
            prepared = self._guard.call(
                lambda: prepare_batch(self._state, batches, self._config, self._ranks, self._device), batches
            )
        replay_routes(batches, proximal)
        epo = self._config.loss.epo
        phase = 1.0 if isinstance(epo.phase, str) else phase_weight(now, epo.phase, epo.gamma)
        version = VersionInputs(batches, proximal, audit, prepared, phase)
        results: list[MicroBatchResult] = []
        place = 0
        for number, (own, minibatch) in enumerate(zip(mine, minibatches, strict=True)):
            places = range(place, place + len(own))
            place += len(own)
            loss_before = sums.loss
            with timer.of("passes"):
                passed = self._passes.run(version, places, minibatch, sums)
            results += [
                one.result(first=number == 0, ranks=self._ranks) for one in passed.passes if not one.batch.is_empty
            ]
            if number == 0:
                with timer.of("cut"):
                    before_first_step()
            with timer.of("step"):
                if passed.usable:
                    self._step(passed.passes, sums)
                else:
                    # AdamW would move the weights by momentum and decay, although no token is usable
                    sums.empty, sums.loss = sums.empty + 1, loss_before
                    self._passes.discard()
            sums.normalizers.append(passed.bounds.normalizer)
        totals = TokenTotals.summed(self._ranks.gather_shares(TokenTotals.of(results, now, sums)))
        self._update_state(totals, now)
        self._state.expect(now)
        if self._device.type == "cpu":
            self._heap.after_version()
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
            missed=self._state.missed(self._ranks),
            rejected=self._guard.take(),
        )

    def _make_passes(self) -> Passes:
        return Passes(self._policy, self._state, self._ranks, self._config, self._objective, self._guard)

    def _micro_batches(self, minibatch: Sequence[Row]) -> list[PaddedBatch]:
        """This rank's share of a minibatch."""
        if self._config.vcpo.baseline:  # one trajectory for each pass, group after group
            return [pad([row]) if own else empty_batch() for row, own in rows_in_turn(minibatch, self._ranks)]
        shares = partition_by_rank(minibatch, self._ranks.shares)
        share = shares[self._ranks.share]
        split = partial(
            micro_batches, max_tokens=self._config.micro_batch_tokens, packed=packs_rows(self._policy.model)
        )
        own = split(share)
        passes = len(own)
        if self._ranks.equal_passes:
            passes = max(len(split(each)) for each in shares)
        return [pad(rows) for rows in own] + [empty_batch() for _ in range(passes - len(own))]

    def _fresh(self, minibatches: Sequence[Sequence[PaddedBatch]]) -> int:
        """Number of leading micro-batches whose training passes have the weights that the version starts with.

        These are the micro-batches of the first minibatch: every later pass comes after an optimizer step. 0 if limits
        of the minibatch need the proximal before its passes.
        """
        rules = self._objective.rules
        return len(minibatches[0]) if minibatches and rules.m2 is None and not rules.weight_normalize else 0

    def _audit(self, batches: Sequence[PaddedBatch], now: Version, fresh: int) -> Proximal | None:
        """Return old log-probs if this version is audited, else None."""
        auditor, fraction = self._state.auditor, self._config.audit.fraction
        if auditor is None or np.random.default_rng([self._seed, now]).random() >= fraction:
            return None
        return auditor.proximal(batches, now, fresh)

    def _step(self, passes: Sequence[MicroBatchPass], sums: StepAccumulator) -> None:
        """One optimizer step, all ranks together."""
        config = self._config.vcpo
        factor = 1.0
        if config.lr_scaling != "off":
            inputs = [one.inputs for one in passes]
            ratios = [
                trajectory_log_ratio(one.current, one.behavior, one.mask)[one.mask.any(-1)].cpu() for one in inputs
            ]
            share = ess(torch.cat([torch.empty(0, dtype=torch.float64), *ratios]), gather=self._ranks.gather_shares)
            factor = lr_factor(share, config.base, POWERS[config.lr_scaling])
        sums.lr_factors.append(factor)
        if not config.baseline:  # the baseline has summed them over the ranks
            self._policy.sum_gradients(self._ranks)
        sums.norms.append(self._policy.step(lr_factor=factor))
        if self._state.critic is not None:
            self._state.critic.trainable.sum_gradients(self._ranks)
            self._state.critic.step()

    def _divergence(self, totals: TokenTotals) -> dict[str, float]:
        """Mean penalty KL(current || start) of the usable tokens, nats, if it is in the loss."""
        kl = self._config.loss.kl
        return {"kl_start": totals.mean_divergence} if kl.weight and kl.place == "loss" else {}

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
