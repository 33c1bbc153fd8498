"""The rollout worker: reads tasks and versions, publishes trajectories."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from palimpsest.common.bus.port import Bus, Record
from palimpsest.common.instruments import HEARTBEAT, AgeGauge
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    ControlChanged,
    EvaluationEnded,
    EvaluationStarted,
    GroupOffered,
    RunFinished,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    trajectory_id,
)
from palimpsest.common.offset_tracker import OffsetTracker
from palimpsest.common.run_end import RunEnd
from palimpsest.common.service import Status
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.trajectory_limit import TrajectoryLimit
from palimpsest.common.versions import Version
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.async_consumer import AsyncConsumer
from palimpsest.services.rollout.cut_responder import CutResponder
from palimpsest.services.rollout.evaluations import WorkerEvaluations
from palimpsest.services.rollout.live_settings import LiveSettings
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.record_reader import RecordReader
from palimpsest.services.rollout.slots import Slots
from palimpsest.services.rollout.task_sets import cancel_all, wait_first
from palimpsest.services.rollout.trajectory_sampler import TrajectorySampler
from palimpsest.services.rollout.weights import UpdateResult, WeightSync

GROUP = "rollout"
POLL_S = 0.25
KEEP_S = 0.25
"""Interval between commits, in seconds; the consumer group's session timeout is much longer."""
ALIVE_S = 2.0
DRAIN_S = 10.0
"""Time limit for trajectories in flight to finish after a stop request, in seconds."""
NO_PARTITION = "a task partition: other workers hold all of them; raise bus.task_partitions or run fewer workers"


@dataclass
class _Counts:
    ready: float | None = None
    live: int = 0
    finished: int = 0
    idle_s: float = 0.0
    idle_since: float | None = None


class Worker:
    """Samples trajectories until the run is finished or the worker receives a stop request."""

    def __init__(
        self,
        *,
        run: str,
        name: str,
        bus: Bus,
        sampler: TrajectorySampler,
        weights: WeightSync,
        max_live: int,
        limit: TrajectoryLimit,
        samples: int,
        versions: int,
        evaluation_samples: int = 0,
        control: ControlCheck,
        hold_s: float | None = None,
        sleeps: bool = False,
    ) -> None:
        """samples, evaluation_samples: most trajectories of a group, and of one of an evaluation (0: the run has none).
        versions: of the run. control: checks records for the learner that has the run. hold_s, sleeps: see
        CutResponder."""
        self._run, self._name, self._bus = run, name, bus
        self._sampler, self._weights = sampler, weights
        self._slots, self._end = Slots(max_live), RunEnd(versions)
        self._settings = LiveSettings(self._slots, max_live=max_live)
        self._evaluations = WorkerEvaluations(weights.evaluate, self.fail)
        self._samples = max_live
        """Trajectories of the last group. At first a single group is taken."""
        self._outbox = Outbox(bus)
        self._reader = RecordReader(
            run, self._outbox, control, limit, samples=(samples, evaluation_samples), worker=name
        )
        self._interruption = CutResponder(
            run=run, worker=name, engine=sampler.engine, live=sampler.live, weights=weights, outbox=self._outbox,
            hold_s=hold_s, sleeps=sleeps,
        )  # fmt: skip
        self._frontier = OffsetTracker()
        self._known_tasks: dict[int, int] = {}
        """Partition -> end of the tasks when the worker began to take them."""
        self._committed: dict[int, int] = {}
        self._stopping = asyncio.Event()
        self._counts = _Counts()
        self._waiting_for: str | None = "the engine"
        self._live: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Queue[BaseException] = asyncio.Queue()

    def stop(self) -> None:
        """Take no more tasks, finish the trajectories in flight, return from `work`."""
        self._stopping.set()

    def fail(self, error: BaseException) -> None:
        """End `work` with this error; the trajectories in flight are neither dropped nor committed."""
        self._failed.put_nowait(error)

    def waiting_for(self) -> str | None:
        """Return the noun phrase of what the worker waits for; None while it works."""
        return self._waiting_for

    def not_ready(self) -> str | None:
        """Return why the worker could take no task now; None if it could, also while there is no task."""
        return self._waiting_for if self._counts.ready is None or self._stopping.is_set() else None

    def alive(self) -> WorkerAlive:
        """Return a heartbeat with the worker's counts."""
        counts, now = self._counts, time.monotonic()
        return WorkerAlive(
            run=self._run,
            worker=self._name,
            version=self._weights.verified,
            live=counts.live,
            sampled_tokens=self._sampler.tally.sampled_tokens,
            seconds=now - counts.ready if counts.ready else 0.0,
            idle_s=counts.idle_s + (now - counts.idle_since if counts.ready and counts.idle_since else 0.0),
        )

    def status(self) -> Status:
        """Return the fields for /v1/status."""
        alive = self.alive()
        fields = {name: getattr(alive, name) for name in alive.__struct_fields__}
        return fields | {
            "finished": self._counts.finished,
            "cut": self._interruption.cut,
            "engine": self._sampler.engine.status(),
        }

    def report_update(self, applied: UpdateResult) -> None:
        """Publish the outcome of an update."""
        self._outbox.put_from_worker(
            VersionApplied(
                run=self._run, worker=self._name, version=applied.manifest.version, digest=applied.manifest.digest,
                accepted=applied.accepted, canary_error=min(applied.canary_error, 1e9), pause_s=applied.pause_s,
                live=self._counts.live,
            )
        )  # fmt: skip

    async def work(self) -> None:
        """Sample trajectories until the run ends.

        Raises UserError if the canaries refuse a version or the engine refuses an update or a cut; EngineDead as soon
        as the engine is gone. Trajectories in flight are then neither dropped nor committed: the next worker that
        receives their tasks samples them again.
        """
        async with (
            AsyncConsumer(self._bus.consumer(CONTROL)) as control,
            AsyncConsumer(self._bus.consumer(TASKS, group=GROUP, member=self._name), lag_of=TASKS) as tasks,
        ):
            publishing = asyncio.create_task(self._outbox.run())
            jobs = (
                self._consume_control(control), self._weights.sync_loop(), self._interruption.serve(),
                self._commit_loop(tasks), self._raise_failures(), self._heartbeat_loop(), self._sampler.engine.watch(),
            )  # fmt: skip
            running = {publishing, *map(asyncio.create_task, jobs)}
            taking = asyncio.create_task(self._take(tasks))
            stopping = asyncio.create_task(self._stopping.wait())
            try:
                await wait_first({*running, taking, stopping})
                await cancel_all({taking, *self._evaluations.deferred})
                running.add(asyncio.create_task(self._drain(publishing)))
                await wait_first(running)
                await self._commit(tasks)
            except Exception:
                taking.cancel()
                await self._flush_outbox(publishing)
                raise
            finally:
                await cancel_all({*running, taking, stopping, *self._live, *self._evaluations.deferred})

    async def _heartbeat_loop(self) -> None:
        """Publish heartbeats."""
        heartbeat = AgeGauge(HEARTBEAT.labels("rollout"))
        while True:
            heartbeat.restart()
            await asyncio.sleep(ALIVE_S)
            self._outbox.put_from_worker(self.alive())

    async def _raise_failures(self) -> None:
        """Raise the first error of a trajectory that another attempt cannot resolve; it ends the worker."""
        raise await self._failed.get()

    async def _flush_outbox(self, publishing: "asyncio.Task[None]") -> None:
        """Try to publish the rest of the outbox, above all the report of a refused version, within DRAIN_S."""
        if not publishing.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._outbox.flush()

    async def _drain(self, publishing: "asyncio.Task[None]") -> None:
        self._outbox.put_from_worker(self.alive())
        self._waiting_for = "trajectories in flight, before it stops"
        logger().info("draining", live=self._counts.live)
        if self._live:
            await asyncio.wait(self._live, timeout=DRAIN_S)
        await self._flush_outbox(publishing)

    async def _consume_control(self, control: AsyncConsumer) -> None:
        """Follow versions, cuts and the end of the run."""
        await self._interruption.join(self.alive())
        known = await control.ends()  # records before these offsets are older than this worker
        newest, caught_up = Version(-1), False
        while True:
            await self._outbox.room()
            records = await control.poll(limit=256, timeout_s=POLL_S)
            for record in records:
                message = await self._reader.read_control(record, history=record.offset < known[record.partition])
                if message is None:
                    continue
                self._end.observe(message)
                self._interruption.observe(message)
                match message:
                    case VersionPublished():
                        newest = max(newest, message.version)
                        await self._evaluations.observe(message)
                    case ControlChanged(what="settings"):
                        self._settings.use(message)
                    case EvaluationStarted() | EvaluationEnded():
                        await self._evaluations.observe(message)
                    case RunFinished() if record.offset >= known[record.partition]:
                        logger().info("run finished", version=message.version)
                        self.stop()
            read, caught_up_before = control.positions(), caught_up
            caught_up = all(read[partition] >= end for partition, end in known.items())
            if caught_up and not caught_up_before and await self._reader.is_over(self._end):
                logger().info("the run is over: it trained all its versions, and no learner continues it")
                self.stop()
            if caught_up and (records or not caught_up_before):
                self._weights.announce(newest)
                self._interruption.apply()
            if not records and self._interruption.cut is not None and await control.ends() == read:
                self._interruption.note_end_of_log()

    async def _take(self, tasks: AsyncConsumer) -> None:
        """Take tasks as slots become free."""
        self._waiting_for = "the first version"
        self._known_tasks = await tasks.ends()
        await self._weights.wait_first_version()
        self._counts.ready = self._counts.idle_since = time.monotonic()
        wait = "tasks"
        while True:
            if not self._counts.live:
                self._waiting_for = wait
            await self._slots.acquire()
            self._slots.release()
            await self._outbox.room()
            groups = max(1, self._slots.free // self._samples)  # more would lie here while another worker is idle
            for record in await tasks.poll(limit=groups, timeout_s=POLL_S):
                await self._start_group(record)
            if (now := "tasks" if tasks.assignment() else NO_PARTITION) != wait:
                wait = now
                if wait == NO_PARTITION:
                    logger().warning("no task partition", reason=NO_PARTITION)

    async def _commit_loop(self, tasks: AsyncConsumer) -> None:
        """Commit finished tasks, and poll so that the worker stays a member of the group while it takes no tasks."""
        await self._weights.wait_first_version()
        while True:
            await asyncio.sleep(KEEP_S)
            await tasks.poll(limit=0, timeout_s=0)
            await self._commit(tasks)

    async def _start_group(self, record: Record) -> None:
        """Start a task's trajectories, each as soon as a slot is free."""
        self._frontier.read(record.partition, record.offset)

        def resolve() -> None:
            self._frontier.resolve(record.partition, record.offset)

        known = record.offset < self._known_tasks.get(record.partition, 0)
        group = await self._reader.read_offer(record, resolve, history=known)
        if group is None:
            return
        if await self._weights.wait_unless_evaluating(group.version):
            await self._start_samples(group, resolve)
        else:  # evaluations behind it must not wait for it
            self._evaluations.defer(
                self._weights.wait_verified(group.version), lambda: self._start_samples(group, resolve)
            )

    async def _start_samples(self, group: GroupOffered, resolve: Callable[[], None]) -> None:
        self._waiting_for = None
        left = self._samples = group.samples

        def published() -> None:
            nonlocal left
            left -= 1
            if not left:
                resolve()

        for sample in range(group.samples):
            await self._slots.acquire()
            self._count_live(+1)
            task = asyncio.create_task(self._trajectory(group, sample, published))
            self._live.add(task)
            task.add_done_callback(self._live.discard)

    async def _trajectory(self, group: GroupOffered, sample: int, published: Callable[[], None]) -> None:
        try:
            ended = await self._sampler.sample(group, sample)
            self._outbox.put_trajectory(
                ended, group=group.group, trajectory=trajectory_id(group.group, sample), done=published
            )
            self._counts.finished += 1
        except Exception as error:
            self._failed.put_nowait(error)
        finally:
            self._count_live(-1)
            self._slots.release()

    async def _commit(self, tasks: AsyncConsumer) -> None:
        for partition in set(self._committed) - tasks.assignment():
            self._frontier.forget(partition)
        offsets = self._frontier.offsets()
        if offsets != self._committed:
            await tasks.commit(offsets)
            self._committed = offsets

    def _count_live(self, change: int) -> None:
        now = time.monotonic()
        self._counts.live += change
        instruments.LIVE.set(self._counts.live)
        if self._counts.live and self._counts.idle_since is not None:
            self._counts.idle_s += now - self._counts.idle_since
            instruments.IDLE_SECONDS.inc(now - self._counts.idle_since)
            self._counts.idle_since = None
        elif not self._counts.live and self._counts.ready:
            self._counts.idle_since = now
