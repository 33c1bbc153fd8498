"""What ranks other than 0 do: take over what rank 0 has, then train on what it orders."""

from dataclasses import dataclass

from common.versions import Version
from services.learner.batching import Row
from services.learner.companions import Companions
from services.learner.model import Trainee
from services.learner.ranks import Ranks
from services.learner.step import Step

NOTHING: tuple[None] = (None,)


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 tells the others to do next; None in its place ends the run."""

    version: Version
    minibatches: list[list[Row]]


def follow(trainee: Trainee, companions: Companions, step: Step, ranks: Ranks) -> None:
    """Ranks other than 0: take rank 0's state over, then train on what it orders until it says that it is over."""
    take_over(trainee, companions, ranks)
    while (order := ranks.share(NOTHING)[0]) is not None:
        ranks.gather(step.train(order.minibatches, order.version))


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
