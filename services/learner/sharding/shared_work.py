"""Work that needs the shards of all ranks, ordered by rank 0.

Rank 0 broadcasts a function; every rank calls it with its own `Shards`. Outside of training, the other ranks wait for
such orders (old_logprobs/distributed_scorer.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.part_messages import PartMessages, PartServer
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.version_part import VersionPart

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shards:
    """A rank's shards of the policy."""

    policy: ShardedPolicy | AdapterPolicy
    files: ModelFiles
    ranks: ProcessGroup
    part: VersionPart
    """What this rank stores of each version; nothing of an adapter, which rank 0 stores."""
    messages: PartMessages | None = None
    """Between the threads that store versions; None if the loops' threads store them."""
    server: PartServer | None = None
    """The thread of a rank other than 0 that stores its part; None if there is none."""

    @property
    def split_policy(self) -> ShardedPolicy | None:
        """The policy if masters and moments are shards; None if it trains an adapter, which is whole on every rank."""
        return self.policy if isinstance(self.policy, ShardedPolicy) else None


@dataclass(frozen=True, slots=True, eq=False)
class SharedWork:
    """An order: every rank calls `work` with its shards. It must be a function of a module, or a partial of one."""

    work: Callable[[Shards], object]


class OnAllRanks:
    """Rank 0's side of shared work. The other ranks must wait for orders."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __call__(self, work: Callable[[Shards], T]) -> T:
        """Call the function on every rank. Return rank 0's result."""
        self._shards.ranks.broadcast_object((SharedWork(work),))
        return work(self._shards)
