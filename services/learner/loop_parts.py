"""The objects that the learner's loop works with, in groups."""

from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.history import History
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Training:
    """The objects that train the policy, on every rank."""

    trainer: Trainer
    policy: TrainablePolicy
    state: TrainingState
    """The state beside the policy; a checkpoint holds both."""
    ranks: ProcessGroup
    shards: Shards | None = None
    """Of a sharded policy."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Writers of versions, checkpoints and evaluations. The store refuses their writes after another learner took the
    run."""

    writer: Writer
    publisher: Publisher
    checkpoints: Checkpoints
    evaluator: Evaluator


@dataclass(frozen=True, slots=True)
class Records:
    """Writers of the records about each version."""

    open_history: Callable[[int], History]
    """Opens the history, truncated to a number of bytes."""
    dump: BatchDump
    reporter: VersionReporter


def most_unresolved(config: RunConfig) -> int:
    """Return the number of trajectories that may be unresolved at the same time."""
    return (config.learner.max_staleness + 1) * config.learner.groups_per_batch * config.tasks.samples_per_group
