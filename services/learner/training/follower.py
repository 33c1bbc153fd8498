"""What ranks other than 0 do: take over what rank 0 has, then score what it hands out and train on what it orders."""

from dataclasses import dataclass

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import Ranks
from palimpsest.services.learner.model.trainable import Trainee
from palimpsest.services.learner.old_logprobs.distributed_scorer import Pass, score_along
from palimpsest.services.learner.training.state import Companions
from palimpsest.services.learner.training.trainer import Step


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 tells the others to do next; None in its place ends the run."""

    version: Version
    minibatches: list[list[Row]]


def follow(trainee: Trainee, companions: Companions, step: Step, ranks: Ranks, one: Pass) -> None:
    """Ranks other than 0: take rank 0's state over, then do what it says until it says nothing.

    one: a forward pass by the trainee's model; it is asked for while a batch is waited for, and while workers stand
    still before the first optimizer step.
    """
    take_over(trainee, companions, ranks)

    def cut() -> None:
        score_along(ranks, one)

    while isinstance(order := score_along(ranks, one), Order):
        ranks.gather(step.train(order.minibatches, order.version, before_first_step=cut))


def take_over(trainee: Trainee, companions: Companions, ranks: Ranks) -> None:
    """Make every rank's state that of rank 0: masters, moments, and what trains along with them."""
    steps = ranks.share(trainee.steps)
    state = trainee.state()
    ranks.broadcast(list(state.values()))
    beside = companions.state()
    ranks.broadcast(list(beside.values()))
    if not ranks.leads:
        trainee.restore(state, steps)
        companions.restore(beside)
