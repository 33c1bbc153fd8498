"""A rollout worker: tasks in, trajectories out, versions followed."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from common.bus.port import Bus, Consumer, Record
from common.frontier import Frontier
from common.logs import logger
from common.messages import (
    CONTROL,
    TASKS,
    GroupOffered,
    RunFinished,
    Undecodable,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    dead_letter,
    decode,
    trajectory_id,
)
from common.service import Status
from services.rollout import metrics
from services.rollout.outbox import Outbox
from services.rollout.trajectories import Sampler
from services.rollout.weights import Applied, Weights

GROUP = "rollout"
POLL_S = 0.25
ALIVE_S = 2.0
DRAIN_S = 10.0
"""Live trajectories get so long to finish when the worker is asked to stop."""


@dataclass
class _Counts:
    ready: float | None = None
    live: int = 0
    finished: int = 0
    idle_s: float = 0.0
    idle_since: float | None = None


class Worker:
    """Runs until the run is finished or it is asked to stop."""

    def __init__(self, *, run: str, name: str, bus: Bus, sampler: Sampler, weights: Weights, max_live: int) -> None:
        self._run, self._name, self._bus = run, name, bus
        self._sampler, self._weights = sampler, weights
        self._slots = asyncio.Semaphore(max_live)
        self._outbox = Outbox(bus)
        self._frontier = Frontier()
        self._stopping = asyncio.Event()
        self._counts = _Counts()
        self._waiting_for: str | None = "the engine"
        self._live: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Queue[BaseException] = asyncio.Queue()

    def stop(self) -> None:
        """Take no more tasks, finish what is live, return from `work`."""
        self._stopping.set()

    def waiting_for(self) -> str | None:
        """What keeps it from working; None while it works."""
        return self._waiting_for

    def alive(self) -> WorkerAlive:
        """How the worker fares."""
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
        """For /v1/status."""
        alive = self.alive()
        return {name: getattr(alive, name) for name in alive.__struct_fields__} | {"finished": self._counts.finished}

    def applied(self, applied: Applied) -> None:
        """Tell the log what came of an update."""
        self._outbox.put_from_worker(
            VersionApplied(
                run=self._run,
                worker=self._name,
                version=applied.manifest.version,
                digest=applied.manifest.digest,
                accepted=applied.accepted,
                canary_error=min(applied.canary_error, 1e9),
                pause_s=applied.pause_s,
                live=self._counts.live,
            )
        )

    async def work(self) -> None:
        """Until the run ends. Raises Refusal when a version is refused."""
        publishing = asyncio.create_task(self._outbox.run())
        following = asyncio.create_task(self._follow())
        updating = asyncio.create_task(self._weights.keep_up())
        taking = asyncio.create_task(self._take())
        failing = asyncio.create_task(self._fail())
        telling = asyncio.create_task(self._tell())
        stopping = asyncio.create_task(self._stopping.wait())
        workers = {publishing, following, updating, taking, failing, telling, stopping}
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
            for task in workers:
                if task.done() and (error := task.exception()):
                    await self._say_last(publishing)
                    raise error
            await self._drain(publishing)
        finally:
            for task in workers | self._live:
                task.cancel()
            await asyncio.gather(*workers, *self._live, return_exceptions=True)

    async def _tell(self) -> None:
        """Say how the worker fares, now and then."""
        while True:
            await asyncio.sleep(ALIVE_S)
            self._outbox.put_from_worker(self.alive())

    async def _fail(self) -> None:
        """A trajectory met something that no attempt can mend: the worker must not go on as if it had not."""
        raise await self._failed.get()

    async def _say_last(self, publishing: "asyncio.Task[None]") -> None:
        """What is in the outbox (a refused version, above all) should still be heard of."""
        if not publishing.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._outbox.flushed()

    async def _drain(self, publishing: "asyncio.Task[None]") -> None:
        self._outbox.put_from_worker(self.alive())
        self._waiting_for = "live trajectories, before it stops"
        logger().info("draining", live=self._counts.live)
        if self._live:
            await asyncio.wait(self._live, timeout=DRAIN_S)
        await self._say_last(publishing)

    async def _follow(self) -> None:
        """Hear of versions and of the end."""
        with self._bus.consumer(CONTROL) as consumer:
            known = sum(consumer.ends().values())  # what is older than this worker is history, not news
            heard = 0
            while True:
                for record in await asyncio.to_thread(consumer.poll, limit=256, timeout_s=POLL_S):
                    heard += 1
                    match self._read(record):
                        case VersionPublished() as published:
                            self._weights.announce(published.version)
                        case RunFinished() as finished if heard > known:
                            logger().info("run finished", version=finished.version)
                            self.stop()

    async def _take(self) -> None:
        """Take tasks as slots get free, and commit what is done."""
        self._waiting_for = "the first version"
        await self._weights.first()
        self._counts.ready = self._counts.idle_since = time.monotonic()
        committed: dict[int, int] = {}
        consumer = self._bus.consumer(TASKS, group=GROUP, member=self._name)
        try:
            while True:
                if not self._counts.live:
                    self._waiting_for = "tasks"
                await self._slots.acquire()
                self._slots.release()
                for record in await asyncio.to_thread(consumer.poll, limit=1, timeout_s=POLL_S):
                    await self._begin(record)
                committed = await self._commit(consumer, committed)
        finally:
            consumer.close()

    def _read(self, record: Record, done: Callable[[], None] = lambda: None) -> Any:
        """The record's message; None when it is not for this run or cannot be read (then it is dead-lettered)."""
        try:
            message = decode(record.topic, record.body)
        except Undecodable as error:
            logger().error("dead letter", topic=record.topic, offset=record.offset, reason=str(error))
            self._outbox.put_dead_letter(dead_letter(self._run, record, str(error)), done=done)
            return None
        if message.run != self._run:
            done()
            return None
        return message

    async def _begin(self, record: Record) -> None:
        """Start a task's trajectories, each as soon as there is a slot."""
        self._frontier.read(record.partition, record.offset)

        def resolve() -> None:
            self._frontier.resolve(record.partition, record.offset)

        group: GroupOffered | None = self._read(record, resolve)
        if group is None:
            return
        await self._weights.trusted(group.version)
        self._waiting_for = None
        left = group.samples

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

    async def _commit(self, consumer: Consumer, committed: dict[int, int]) -> dict[int, int]:
        for partition in set(committed) - consumer.assignment():
            self._frontier.forget(partition)
        offsets = self._frontier.offsets()
        if offsets != committed:
            await asyncio.to_thread(consumer.commit, offsets)
        return offsets

    def _count_live(self, change: int) -> None:
        now = time.monotonic()
        self._counts.live += change
        metrics.LIVE.set(self._counts.live)
        if self._counts.live and self._counts.idle_since is not None:
            self._counts.idle_s += now - self._counts.idle_since
            metrics.IDLE_SECONDS.inc(now - self._counts.idle_since)
            self._counts.idle_since = None
        elif not self._counts.live and self._counts.ready:
            self._counts.idle_since = now
