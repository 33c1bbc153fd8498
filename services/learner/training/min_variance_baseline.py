"""VCPO's minimum-variance baseline: computes the gradient of each trajectory separately, then combines them.

The baseline of a group weights its trajectories by the norm of their gradients, so it is known only after the last pass
of the group. Until then, two sums are kept: w g R over the minibatch and w g over the group. They cost two more copies
of the gradient and one pass for each trajectory.

If each pass needs all ranks (sharding), it adds the gradients of all of them. Then the ranks pass one trajectory at a
time: one rank has it, the others pass padding, whose gradient is 0. Each rank sums its shards.
"""

from collections.abc import Sequence

import torch

from palimpsest.services.learner.batch.batching import Row, partition_by_rank
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.vcpo import minimum_variance_baseline, subtract_baseline
from palimpsest.services.learner.model.trainable import TrainablePolicy


def rows_in_turn(minibatch: Sequence[Row], ranks: ProcessGroup) -> list[tuple[Row, bool]]:
    """Return the rows of this rank's passes, group after group, and whether the row is its own: if passes need all
    ranks, it passes padding in place of the others' rows."""
    owner = {id(row): share for share, rows in enumerate(partition_by_rank(minibatch, ranks.shares)) for row in rows}
    ordered = sorted(minibatch, key=lambda row: (row.group, len(row.tokens), row.trajectory))
    every = [(row, owner[id(row)] == ranks.share) for row in ordered]
    return every if ranks.equal_passes else [(row, own) for row, own in every if own]


class MinimumVarianceBaseline:
    """Collects the gradients of one minibatch, group after group."""

    def __init__(self, policy: TrainablePolicy, ranks: ProcessGroup) -> None:
        self._policy, self._ranks = policy, ranks
        self._gradients = policy.gradients()
        self._weighted = [torch.zeros_like(gradient) for gradient in self._gradients]
        self._scores = [torch.zeros_like(gradient) for gradient in self._gradients]
        self._norms: list[float] = []
        self._rewards: list[float] = []

    def add(self, reward: float) -> None:
        """Add the gradients of one trajectory of the group, computed with advantages of 1, and set them to zero.

        If passes need all ranks, every rank calls it for every trajectory.
        """
        if self._ranks.equal_passes:
            self._policy.sum_gradients(self._ranks)
        self._norms.append(self._policy.squared_norm())
        self._rewards.append(reward)
        for gradient, weighted, score in zip(self._gradients, self._weighted, self._scores, strict=True):
            weighted.add_(gradient, alpha=reward)
            score.add_(gradient)
            gradient.zero_()

    def end_group(self) -> float:
        """Subtract the baseline of the group and return it, in units of reward. Every rank calls it for every group.

        A rank's part of a group may be empty. A trajectory whose gradient is not finite is left out of the baseline but
        not of the gradients, so that the step is skipped.
        """
        own = (self._norms, self._rewards)
        parts = [own] if self._ranks.equal_passes else self._ranks.all_gather_object(own)
        norms = [norm for part in parts for norm in part[0]]
        rewards = [reward for part in parts for reward in part[1]]
        finite = [i for i, norm in enumerate(norms) if norm < float("inf")]  # excludes NaN too
        kept = [norms[i] for i in finite]
        # the measured gradient holds w, so its squared norm is w^2 |g|^2
        baseline = minimum_variance_baseline([1.0] * len(kept), kept, [rewards[i] for i in finite]) if kept else 0.0
        subtract_baseline(self._weighted, self._scores, baseline)
        for score in self._scores:
            score.zero_()
        self._norms, self._rewards = [], []
        return baseline

    def settle(self) -> None:
        """Set the gradients to those of the minibatch over all ranks. Call it after the last group."""
        if not self._ranks.equal_passes:
            self._ranks.all_reduce_sum(self._weighted)
        for gradient, weighted in zip(self._gradients, self._weighted, strict=True):
            gradient.copy_(weighted)
