"""The ledger of one evaluation: every offered trajectory, and how it ended. Pure.

Invariant:  offered = scored + dropped + dead-lettered + pending. It shares nothing with the ledger of the training.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from palimpsest.common.evaluation.estimates import EnvironmentResult, TaskCounts, environment_result
from palimpsest.common.evaluation.tasks import HeldOutTask, evaluation_group, parse_group, parse_sample
from palimpsest.common.messages import DropReason, trajectory_id
from palimpsest.common.versions import Version
from palimpsest.services.learner.evaluation.state import DEAD_LETTERED, SCORED, SampleEnd


class EvaluationLedger:
    """The trajectories of one version on all tasks.

    >>> ledger = EvaluationLedger(Version(7), [HeldOutTask("add", 5)], samples=2)
    >>> ledger.groups(), ledger.pending
    (('e000007-000000',), 2)
    >>> ledger.end("e000007-000000/1", SampleEnd("scored", True, 1.0)), ledger.pending
    (True, 1)
    >>> ledger.end("e000007-000000/1", SampleEnd("scored", False, 0.0)), ledger.counts()
    (False, {'offered': 2, 'scored': 1, 'dropped': {}, 'dead_lettered': 0, 'pending': 1})
    """

    def __init__(self, version: Version, tasks: Sequence[HeldOutTask], *, samples: int) -> None:
        self.version, self._tasks, self._samples = version, tuple(tasks), samples
        self._ends: dict[str, SampleEnd] = {}

    @property
    def ends(self) -> Mapping[str, SampleEnd]:
        """Trajectory -> its end."""
        return self._ends

    @property
    def pending(self) -> int:
        """Number of trajectories that have not ended."""
        return len(self._tasks) * self._samples - len(self._ends)

    def groups(self) -> tuple[str, ...]:
        """Return the ids of the groups, one for each task."""
        return tuple(evaluation_group(self.version, number) for number in range(len(self._tasks)))

    def task(self, group: str) -> HeldOutTask | None:
        """Return the task of a group of this evaluation, None for another group."""
        found = parse_group(group)
        if found is None or found[0] != self.version or found[1] >= len(self._tasks):
            return None
        return self._tasks[found[1]]

    def offered(self, trajectory: str) -> bool:
        """Return whether the trajectory belongs to this evaluation."""
        found = parse_sample(trajectory)
        return found is not None and found[1] < self._samples and self.task(found[0]) is not None

    def end(self, trajectory: str, end: SampleEnd) -> bool:
        """Enter the end of a trajectory. Return False, and change nothing, if it has one or was not offered.

        A usable record replaces a dead letter: the worker's next attempt may follow damage to the first.
        """
        before = self._ends.get(trajectory)
        replaces = before is not None and before.how == DEAD_LETTERED and end.how != DEAD_LETTERED
        if not self.offered(trajectory) or (before is not None and not replaces):
            return False
        self._ends[trajectory] = end
        return True

    def expire(self) -> int:
        """Drop all pending trajectories at the time limit. Return their number."""
        late = self.pending
        for group in self.groups() if late else ():
            for sample in range(self._samples):
                self._ends.setdefault(trajectory_id(group, sample), SampleEnd(DropReason.DEADLINE.value))
        return late

    def restore(self, ends: Mapping[str, SampleEnd]) -> None:
        """Continue from a checkpoint."""
        self._ends = {name: end for name, end in ends.items() if self.offered(name)}

    def counts(self) -> dict[str, int | dict[str, int]]:
        """Return the numbers of trajectories by state."""
        ways = Counter(end.how for end in self._ends.values())
        scored, dead = ways.pop(SCORED, 0), ways.pop(DEAD_LETTERED, 0)
        return {
            "offered": len(self._tasks) * self._samples,
            "scored": scored,
            "dropped": dict(sorted(ways.items())),
            "dead_lettered": dead,
            "pending": self.pending,
        }

    def results(self) -> dict[str, EnvironmentResult]:
        """Return the result of each environment, of what has been scored so far."""
        by_environment: dict[str, list[TaskCounts]] = {}
        for group, task in zip(self.groups(), self._tasks, strict=True):
            ends = [self._ends.get(trajectory_id(group, sample)) for sample in range(self._samples)]
            scored = [end for end in ends if end is not None and end.how == SCORED]
            counts = TaskCounts(len(scored), sum(end.success for end in scored), sum(end.reward for end in scored))
            by_environment.setdefault(task.environment, []).append(counts)
        return {name: environment_result(tasks, k=self._samples) for name, tasks in by_environment.items()}
