"""What ranks other than 0 do: take over what rank 0 has, then score what it hands out and train on what it orders."""

from dataclasses import dataclass

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import Pass, serve_scoring
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """What rank 0 tells the others to do next; None in its place ends the run."""

    version: Version
    minibatches: list[list[Row]]


def run_follower(
    trainee: TrainablePolicy, companions: TrainingState, step: Trainer, ranks: ProcessGroup, forward: Pass
) -> None:
    """Ranks other than 0: take rank 0's state over, then do what it says until it says nothing.

    one: a forward pass by the trainee's model; it is asked for while a batch is waited for, and while workers stand
    still before the first optimizer step.
    """
    broadcast_state(trainee, companions, ranks)

    def cut() -> None:
        serve_scoring(ranks, forward)

    while isinstance(order := serve_scoring(ranks, forward), TrainOrder):
        ranks.all_gather_object(step.train(order.minibatches, order.version, before_first_step=cut))


def broadcast_state(trainee: TrainablePolicy, companions: TrainingState, ranks: ProcessGroup) -> None:
    """Make every rank's state that of rank 0: masters, moments, and what trains along with them."""
    steps = ranks.broadcast_object(trainee.steps)
    state = trainee.state()
    ranks.broadcast(list(state.values()))
    beside = companions.state()
    ranks.broadcast(list(beside.values()))
    if not ranks.is_rank0:
        trainee.restore(state, steps)
        companions.restore(beside)
