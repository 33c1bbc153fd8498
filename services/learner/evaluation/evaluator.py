"""Evaluates versions while the run trains: offers held-out tasks, collects what workers sample, writes the result.

While an evaluation is in progress, workers load no later version (EvaluationStarted, EvaluationEnded), so exactly the
stated version samples every token. Repeating the trajectories that cross a change of weights instead would prefer short
trajectories, and the result would be biased. The training continues with what is in flight: at most max_staleness + 1
versions, since later offers wait for later weights.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.evaluation.estimates import overall
from palimpsest.common.evaluation.lines import sentence
from palimpsest.common.evaluation.tasks import parse_group, parse_sample
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    EvaluationEnded,
    EvaluationStarted,
    GroupOffered,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    encode,
)
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.versions import Version
from palimpsest.services.learner.evaluation import instruments
from palimpsest.services.learner.evaluation.ledger import EvaluationLedger
from palimpsest.services.learner.evaluation.offered import offered_groups
from palimpsest.services.learner.evaluation.pins import BEST, IN_PROGRESS, EvaluationPins
from palimpsest.services.learner.evaluation.results import better, export_to_prometheus, result_line
from palimpsest.services.learner.evaluation.settings import EvaluationSettings, check_sample
from palimpsest.services.learner.evaluation.state import DEAD_LETTERED, NOTHING, SCORED, EvaluationState, SampleEnd
from palimpsest.services.learner.observability.history import History

Message = TrajectoryFinished | TrajectoryDropped | SegmentFlushed


class Evaluator:
    """The evaluations of one learner.

    confirm: raises Fenced unless the run still belongs to this learner. epoch: of this learner. open_file: opens
    evaluations.jsonl, truncated to a number of bytes.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        bus: Bus,
        pins: EvaluationPins,
        *,
        run: str,
        confirm: Callable[[], None],
        epoch: Callable[[], int],
        open_file: Callable[[int], History],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._bus, self._pins, self._run = settings, bus, pins, run
        self._confirm, self._epoch, self._open_file, self._clock = confirm, epoch, open_file, clock
        self._state, self._task_offsets = EvaluationState(), dict[int, int]()
        self._ledger: EvaluationLedger | None = None
        self._began, self._result = 0.0, ""
        self._known: dict[Version, set[str]] = {}
        """Groups that an earlier learner offered after the checkpoint, by version."""
        self._file: History

    @property
    def in_progress(self) -> bool:
        """Whether an evaluation has not ended."""
        return self._ledger is not None

    def status(self) -> str:
        """Return what is in progress, for people."""
        if (ledger := self._ledger) is None:
            return ""
        offered = len(ledger.groups()) * self._settings.samples
        return f"evaluation of version {ledger.version}: {offered - ledger.pending} of {offered} trajectories"

    def result(self) -> str:
        """Return the result of the newest evaluation, for people."""
        return self._result

    def restore(self, state: EvaluationState, task_offsets: Mapping[int, int]) -> None:
        """Take the state of a checkpoint. task_offsets: of topic `tasks`, in the same checkpoint. Then call `start`."""
        self._state, self._task_offsets = state, dict(task_offsets)

    def start(self, version: Version, trained: int) -> None:
        """Begin, or continue after a restart, before anything is read.

        version: the one that this learner announced at its start; trained: versions trained so far.
        The evaluation of any other version, which a learner published after the checkpoint, is abandoned.
        """
        state = self._state
        self._file = self._open_file(state.file_bytes)
        if not self._settings.every:
            self._state = replace(state, version=NOTHING, ends={})
            return
        self._known = offered_groups(self._bus, self._run, self._task_offsets)
        in_progress = () if state.version == NOTHING else (state.version,)
        abandoned = ({*self._known, *in_progress} - {version}) - {*state.evaluated}
        again = state.version in abandoned  # due again, unless the run has trained further
        if again:
            logger().warning("evaluation abandoned: the run continues with a later version", version=state.version)
        self._state = replace(
            state,
            trained=state.trained - again,
            version=NOTHING,
            ends={},
            evaluated=(*state.evaluated, *sorted(abandoned)),
        )
        if state.version == version:
            self._open(version, resumed=True)
            assert self._ledger is not None
            self._ledger.restore(state.ends)
            logger().info("evaluation resumed", version=version, pending=self._ledger.pending)
        elif version in self._known and trained > state.trained:
            self._begin(version, trained)

    def begins(self, trained: int, versions: int) -> bool:
        """Whether `work` would begin an evaluation."""
        return self._ledger is None and self._settings.is_due(trained, versions) and trained > self._state.trained

    def work(self, version: Version, trained: int, versions: int) -> None:
        """Begin, expire or end an evaluation. version: the newest announced; trained: versions trained so far."""
        if self._ledger is None:
            if self.begins(trained, versions):
                self._begin(version, trained)
            return
        if self._clock() - self._began > self._settings.time_limit_s and (late := self._ledger.expire()):
            instruments.SAMPLES.labels("deadline").inc(late)
            logger().warning("evaluation: trajectories did not arrive in time", version=version, dropped=late)
        if not self._ledger.pending:
            self._end()

    def permits_training(self, trained: int, versions: int) -> bool:
        """Whether the next version may be trained. Not during an evaluation if that version would be evaluated too, or
        if training would cut the workers."""
        if self._ledger is None:
            return True
        return not (self._settings.waits or self._settings.is_due(trained + 1, versions))

    def enter(self, message: Message) -> None:
        """Enter what a worker published. Raises RejectedRecord if the evaluation did not offer it."""
        if isinstance(message, SegmentFlushed):
            return  # the end of the trajectory follows
        group, ledger = parse_sample(message.trajectory), self._ledger
        if group is None or group[0] != message.group:
            raise _never_offered(message.trajectory)
        if ledger is None or not ledger.offered(message.trajectory):
            found = parse_group(message.group)
            if found is None or found[0] not in self._state.evaluated:
                raise _never_offered(message.trajectory)
            return  # late: the evaluation has ended without it
        task = ledger.task(message.group)
        assert task is not None
        if isinstance(message, TrajectoryDropped):
            end = SampleEnd(message.reason.value)
        else:
            check_sample(message, task, self._settings, ledger.version)
            end = SampleEnd(SCORED, message.success, message.reward)
        if ledger.end(message.trajectory, end):
            instruments.SAMPLES.labels(end.how).inc()

    def dead_letter(self, trajectory: str) -> None:
        """Enter a trajectory whose record cannot be used."""
        if self._ledger is not None and self._ledger.end(trajectory, SampleEnd(DEAD_LETTERED)):
            instruments.SAMPLES.labels(DEAD_LETTERED).inc()

    def state(self) -> EvaluationState:
        """For a checkpoint."""
        if self._ledger is None:
            return self._state
        return replace(self._state, version=self._ledger.version, ends=dict(self._ledger.ends))

    def _begin(self, version: Version, trained: int) -> None:
        self._state = replace(self._state, trained=trained)
        self._open(version)

    def _open(self, version: Version, *, resumed: bool = False) -> None:
        """Hold the workers at the version, and offer its tasks. resumed: all were offered before the checkpoint."""
        self._ledger = EvaluationLedger(version, self._settings.tasks, samples=self._settings.samples)
        self._pins.move(IN_PROGRESS, version)
        self._confirm()
        started = EvaluationStarted(run=self._run, version=version, writer=self._epoch())
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(started))])
        failpoints.reach("learner.evaluation_started")
        known = set(self._ledger.groups()) if resumed else self._known.get(version, set())
        offers = [offer for offer in map(self._offer, range(len(self._settings.tasks))) if offer.group not in known]
        self._confirm()
        self._bus.publish(TASKS, [Outgoing(offer.group, encode(offer)) for offer in offers])
        self._began = self._clock()
        logger().info("evaluation", version=version, tasks=len(self._settings.tasks), offered=len(offers))

    def _offer(self, number: int) -> GroupOffered:
        assert self._ledger is not None
        task = self._settings.tasks[number]
        return GroupOffered(
            run=self._run,
            group=self._ledger.groups()[number],
            index=number,
            version=self._ledger.version,
            environment=task.environment,
            task_seed=task.seed,
            samples=self._settings.samples,
            sampling=self._settings.sampling,
            time_limit_s=self._settings.time_limit_s,
            writer=self._epoch(),
            evaluation=True,
        )

    def _end(self) -> None:
        """Write the result, pin the best version, and let the workers go on."""
        ledger, before = self._ledger, self._state
        assert ledger is not None
        results = ledger.results()
        best = better(before.best, ledger.version, overall(results))
        line: dict[str, Any] = result_line(
            ledger.version, before.trained, results, ledger.counts(), temperature=self._settings.sampling.temperature,
            seconds=self._clock() - self._began, best=best,
        )  # fmt: skip
        self._confirm()
        self._file.add(line)
        failpoints.reach("learner.evaluation_ended")
        if best is not None:
            self._pins.move(BEST, best.version)
        self._pins.move(IN_PROGRESS, None)
        self._state = replace(
            before, evaluated=(*before.evaluated, ledger.version), file_bytes=self._file.length, best=best
        )
        self._ledger = None
        ended = EvaluationEnded(run=self._run, version=ledger.version, writer=self._epoch())
        self._confirm()
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(ended))])
        export_to_prometheus(line)
        self._result = sentence(line)
        logger().info("evaluated", version=ledger.version, result=self._result)


def _never_offered(trajectory: str) -> RejectedRecord:
    return RejectedRecord(RejectCause.NEVER_OFFERED, f"trajectory {trajectory[:64]} was never offered for evaluation")
