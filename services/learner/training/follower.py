"""Ranks other than 0: take over the state of rank 0, then score and train on its orders."""

from dataclasses import dataclass

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import Pass, serve_scoring
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """An order of rank 0 to train; None instead of an order ends the run."""

    version: Version
    minibatches: list[list[Row]]
    settings: LearnerConfig | None = None
    """The settings from this version on; None: the former ones."""


def run_follower(
    policy: TrainablePolicy,
    state: TrainingState,
    trainer: Trainer,
    ranks: ProcessGroup,
    forward: Pass,
    shards: Shards | None = None,
) -> None:
    """Take over the state of rank 0, then score and train on its orders until it broadcasts NOTHING.

    forward: scores a micro-batch with the policy's current weights. Rank 0 orders scoring while it waits for a batch,
    and during a cut before the first optimizer step. shards: of a sharded policy.
    """
    broadcast_state(policy, state, ranks)

    def cut() -> None:
        serve_scoring(ranks, forward, shards)

    while isinstance(order := serve_scoring(ranks, forward, shards), TrainOrder):
        if order.settings is not None:
            trainer.configure(order.settings)
        ranks.gather_shares(trainer.train(order.minibatches, order.version, before_first_step=cut))
    if shards is not None and shards.server is not None:
        shards.server.close()


def broadcast_state(policy: TrainablePolicy, state: TrainingState, ranks: ProcessGroup) -> None:
    """Overwrite every rank's masters, moments and training state with those of rank 0; a sharded policy reads the
    shards of rank 0's checkpoint."""
    policy.share(ranks)
    state_tensors = state.state()
    ranks.broadcast(list(state_tensors.values()))
    if not ranks.is_rank0:
        state.restore(state_tensors)
