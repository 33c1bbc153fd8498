"""Forward and backward passes of a rank's share of a minibatch, without the rows on which they fail.

The gradients accumulate over the micro-batches. After a failure they are set to zero, and the whole minibatch is passed
again without the rows that cause it: the sums are then those of a minibatch in which these rows have no trainable
token, bit for bit.
"""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.corrections import Correction, Limits, correct, limits
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.m2po import harmful_squares, m2po_tau
from palimpsest.services.learner.losses.objective import Objective, Terms
from palimpsest.services.learner.losses.r2vpo import squared_deviation
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.model.device_batch import on_device, packed_rows
from palimpsest.services.learner.model.failing_rows import failing_places, may_be_of_row, neutral
from palimpsest.services.learner.model.policy import score_batch, score_batch_and_entropy
from palimpsest.services.learner.model.routing import replayed
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.types import Interpolated, ProximalValues, layout
from palimpsest.services.learner.sharding.pass_errors import completing
from palimpsest.services.learner.sharding.sharded_model import device_of
from palimpsest.services.learner.sharding.turns import NotFinite, Turns
from palimpsest.services.learner.training.accumulators import MicroBatchPass, StepAccumulator
from palimpsest.services.learner.training.critic_passes import CriticPasses
from palimpsest.services.learner.training.min_variance_baseline import MinimumVarianceBaseline, rows_in_turn
from palimpsest.services.learner.training.preparation import VersionInputs
from palimpsest.services.learner.training.row_guard import RowGuard
from palimpsest.services.learner.training.state import TrainingState


@dataclass(frozen=True, slots=True)
class Passed:
    """A minibatch after its passes; its gradients are in the policy and the critic."""

    passes: list[MicroBatchPass]
    bounds: Limits
    usable: bool
    """Whether any rank has a usable token."""


class Passes:
    """Computes the gradients of minibatches. Each rank has one."""

    def __init__(
        self,
        policy: TrainablePolicy,
        state: TrainingState,
        ranks: ProcessGroup,
        config: LearnerConfig,
        objective: Objective,
        guard: RowGuard,
    ) -> None:
        self._policy, self._state, self._ranks = policy, state, ranks
        self._config, self._objective, self._guard = config, objective, guard
        self._device = device_of(policy.model)
        self._critic = CriticPasses(state.critic, config, self._device)

    def run(self, version: VersionInputs, places: range, minibatch: Sequence[Row], sums: StepAccumulator) -> Passed:
        """Pass this rank's micro-batches of a minibatch. All ranks must call it.

        If rows of any rank fail, every rank passes the minibatch again, since limits and statistics are of all ranks.
        Raises the error if it belongs to no row. A gradient that is not finite for no row's sake stays as it is.

        places: of the micro-batches in the version; minibatch: rows of all ranks.
        """
        denominators = Denominators.of([row.trainable for row in minibatch], self._objective.length)
        before, looked = deepcopy(sums), False
        while True:
            bounds = self._limits(version, places)
            if self._config.loss.objective == "m2po":
                sums.taus.append(self._tau(version, places, bounds))
            passes, failed = self._attempt(version, places, minibatch, denominators, bounds, sums, look=not looked)
            gathered = self._ranks.all_gather_object((sum(one.usable for one in passes), _kind(failed)))
            if not any(kind for _, kind in gathered):
                return Passed(passes, bounds, usable=any(usable for usable, _ in gathered))
            self.discard()
            # With shards all ranks search, and each has a part of a gradient that is not finite.
            worst = max(kind for _, kind in gathered) if self._ranks.equal_passes else _kind(failed)
            if worst:
                looked = worst == _kind(NotFinite())
                self._take_out(failed or NotFinite(), version, places, denominators, bounds, sums)
            sums.restore(before)
            before = deepcopy(before)

    def discard(self) -> None:
        """Set all gradients to zero. Weights, moments, schedule and step count do not change."""
        self._policy.discard_gradients()
        if self._state.critic is not None:
            self._state.critic.trainable.discard_gradients()

    def _attempt(
        self,
        version: VersionInputs,
        places: range,
        minibatch: Sequence[Row],
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
        *,
        look: bool,
    ) -> tuple[list[MicroBatchPass], Exception | None]:
        """Return the passes, and the error of a row or NotFinite if they failed. look: whether to look for NotFinite.

        With VCPO's baseline rows are taken out one by one, because the ranks meet after each group. If passes need all
        ranks, the passes after one that fails are made, too.
        """
        if self._config.vcpo.baseline:
            return self._passes_with_baseline(version, places, minibatch, denominators, bounds, sums), None
        passes: list[MicroBatchPass] = []
        failed: Exception | None = None
        for place in places:
            try:
                passes.append(self._both(version, place, denominators, bounds, sums))
            except Exception as error:
                if not may_be_of_row(error):
                    raise
                failed = failed or error
                if not self._ranks.equal_passes:
                    break
        if failed is None and look and not self._is_finite():
            failed = NotFinite()
        return passes, failed

    def _take_out(
        self,
        error: Exception,
        version: VersionInputs,
        places: range,
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
    ) -> None:
        """Replace the rows that fail by zeros. Raises the error if none does, unless it is NotFinite."""

        def idle() -> None:
            self._alone(version, places[0], (), denominators, bounds, sums)

        turns = Turns(self._ranks, idle, self._is_finite)
        found = turns.search(
            lambda: {place: self._failing_rows(version, place, denominators, bounds, sums, turns) for place in places}
        )
        self.discard()
        trainable = sum(int(version.batches[place].mask.any(-1).sum()) for place in places)
        number = sum(map(len, found.values()))
        if isinstance(error, NotFinite) and number in (0, trainable):
            return  # the sum alone overflows, or a broken model or loss explains this better than the rows do
        if not number:
            raise error
        for place, reasons in found.items():
            if reasons:
                self._guard.take_out(version.batches, place, reasons)

    def _failing_rows(
        self,
        version: VersionInputs,
        place: int,
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
        turns: Turns,
    ) -> dict[int, str]:
        """Return the rows of a micro-batch whose passes fail: index -> error text. Gradients are zero afterwards."""

        def error_of(kept: Sequence[int]) -> Exception | None:
            """The error of the micro-batch's passes with zeros in place of all other rows."""
            try:
                with turns.trial():
                    self._alone(version, place, kept, denominators, bounds, sums)
            except Exception as error:
                if not may_be_of_row(error):
                    raise
                return error
            finally:
                self.discard()
            return None

        return failing_places(error_of, len(version.batches[place].rows))

    def _alone(
        self,
        version: VersionInputs,
        place: int,
        kept: Collection[int],
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
    ) -> None:
        """Pass a micro-batch with zeros in place of all rows but the kept ones. The gradients are those of the pass."""
        batch = version.batches[place]
        self.discard()
        version.batches[place] = neutral(batch, [row for row in range(len(batch.rows)) if row not in kept])
        try:
            self._both(version, place, denominators, bounds, deepcopy(sums))
        finally:
            version.batches[place] = batch

    def _both(
        self, version: VersionInputs, place: int, denominators: Denominators, bounds: Limits, sums: StepAccumulator
    ) -> MicroBatchPass:
        """Passes of the policy and of the critic over one micro-batch.

        If passes need all ranks, the critic's is made although the policy's has failed: the other ranks are in it.
        """
        try:
            passed = self._pass(version, place, denominators, bounds, sums)
        except Exception as error:
            if self._ranks.equal_passes and may_be_of_row(error):
                self._critic.complete(version, place, denominators)
            raise
        self._critic.train(version, place, denominators)
        return passed

    def _is_finite(self) -> bool:
        """Whether this rank's gradients are finite."""
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(self._gradients()))).all())

    def _gradients(self) -> list[Tensor]:
        critic = self._state.critic
        return self._policy.gradients() + ([] if critic is None else critic.gradients())

    def _limits(self, version: VersionInputs, places: range) -> Limits:
        """Compute the limits that depend on all tokens of a minibatch, before its forward passes."""
        rules = self._objective.rules
        if isinstance(version.proximal, Interpolated) or (rules.m2 is None and not rules.weight_normalize):
            return Limits()
        parts = []
        for place in places:
            own = on_device(version.batches[place], self._device)
            anchor = version.proximal.anchor(place, own.behavior, own.mask)
            parts.append((anchor.logprobs, own.behavior, own.mask, anchor.missing))
        return limits(parts, rules, gather=self._ranks.gather_shares)

    def _tau(self, version: VersionInputs, places: range, bounds: Limits) -> float:
        """M2PO's tau of a minibatch, from the current log-probs of all its tokens before the first backward pass."""
        squares = [torch.empty(0, dtype=torch.float64)]
        for place in places:
            with torch.no_grad():
                current = self._guard.forward(score_batch, version.batches, place)
            inputs, _, _ = self._inputs(version, place, current, bounds)
            squares.append(harmful_squares(inputs).cpu())
        return m2po_tau(torch.cat(squares), self._config.loss.m2po.budget, gather=self._ranks.gather_shares)

    def _passes_with_baseline(
        self,
        version: VersionInputs,
        places: range,
        minibatch: Sequence[Row],
        denominators: Denominators,
        bounds: Limits,
        sums: StepAccumulator,
    ) -> list[MicroBatchPass]:
        """One pass for each trajectory, with the minimum-variance baseline of each group."""
        baseline = MinimumVarianceBaseline(self._policy, self._ranks)
        rows = [row for row, _ in rows_in_turn(minibatch, self._ranks)]
        passes = []
        for group in sorted({row.group for row in minibatch}):
            of_group = []
            for place, row in zip(places, rows, strict=True):
                if row.group == group:
                    of_group.append((self._single(version, place, denominators, bounds, sums), row.reward))
                    baseline.add(row.reward)
            sums.baselines.append(baseline.end_group())
            for one, reward in of_group:
                one.advantages = torch.full_like(one.advantages, reward - sums.baselines[-1])
                passes.append(one)
        baseline.settle()
        return passes

    def _single(
        self, version: VersionInputs, place: int, denominators: Denominators, bounds: Limits, sums: StepAccumulator
    ) -> MicroBatchPass:
        """Pass of a micro-batch of one row while no other gradient is accumulated. Repeated with zeros if it fails."""
        failed: Exception | None = None
        try:
            passed = self._pass(version, place, denominators, bounds, sums)
        except Exception as error:
            if not may_be_of_row(error):
                raise
            failed = error
        kinds = self._ranks.all_gather_object(_kind(failed)) if self._ranks.equal_passes else [_kind(failed)]
        if not any(kinds):
            return passed
        self.discard()
        self._take_out(failed or NotFinite(), version, range(place, place + 1), denominators, bounds, sums)
        return self._pass(version, place, denominators, bounds, sums)

    def _inputs(
        self, version: VersionInputs, place: int, current: Tensor, bounds: Limits
    ) -> tuple[Inputs, ProximalValues, Correction]:
        """Inputs of the objective for one micro-batch. current: log-probs of the policy."""
        own = on_device(version.batches[place], self._device)
        mask, behavior = own.mask, own.behavior
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
        with completing(self._policy.model):
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
            rows = packed_rows(self._policy.model, batch, self._device)
            with replayed(self._policy.model, batch.routes, rows):  # layers computed again choose the same experts
                loss.backward()  # type: ignore[no-untyped-call]
        if prepared.reference and self._config.loss.kl.place == "loss":
            with torch.no_grad():
                sums.divergence += float(self._objective.divergence(inputs, prepared.reference[place]).double().sum())
        sums.add_pass(loss, squared_deviation(outcome.log_update), inputs.usable)
        old = None
        if version.audit is not None:
            exact = version.audit.anchor(place, inputs.current.detach(), inputs.mask)
            old = torch.where(exact.exact, exact.logprobs, torch.nan).cpu()
        removed = outcome.clipped.get("opsm")
        usable = int((inputs.usable if removed is None else inputs.usable & ~removed).sum())
        return MicroBatchPass(
            batch, anchor, inputs, entropy.detach(), correction, outcome.clipped, old, inputs.advantages, usable,
            layout(version.proximal, place),
        )  # fmt: skip


def _kind(error: Exception | None) -> int:
    """0: no error, 1: a gradient that is not finite, 2: a pass that failed."""
    return 0 if error is None else 1 if isinstance(error, NotFinite) else 2
