"""The worker's side of a cut: pause, flush the tokens sampled so far, report the cut as reached, hold the version.

The learner scores a version's tokens before it changes its weights. A worker must not sample further tokens of that
version afterward. From its answer on, it therefore samples nothing with the cut's version or an older one, until a
later record on the log ends the cut (docs/algorithms/interruption.md).
"""

import asyncio
import math
import time
from collections.abc import Sequence

from palimpsest.common import failpoints
from palimpsest.common.logs import logger
from palimpsest.common.messages import Control, CutReached, CutRequested, WorkerAlive
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.cut_state import CutState, flush
from palimpsest.services.rollout.engine.port import Engine
from palimpsest.services.rollout.engine.required import required
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder
from palimpsest.services.rollout.weights import WeightSync

HOLD_LIMIT_S = 120.0
"""If the learner publishes nothing for this time, the worker assumes that it is gone and resumes sampling. Tokens that
it then samples with the cut's version are not scored: a learner that comes back drops them, with a reason."""
ANSWER_S = 5.0
"""Longest interval between two reads of the log. A longer one means that the log or this process was blocked and no
record could arrive, so the hold limit starts over."""


class CutResponder:
    """Serves the cuts of one worker. `live`: its trajectories in flight."""

    def __init__(
        self,
        *,
        run: str,
        worker: str,
        engine: Engine,
        live: Sequence[InFlightTrajectory],
        weights: WeightSync,
        outbox: Outbox,
        hold_s: float | None = None,
        sleeps: bool = False,
    ) -> None:
        """hold_s: see learner.proximal.hold_s; None: HOLD_LIMIT_S. sleeps: whether the engine sleeps at a cut. Only
        the learner then ends the hold, because it computes on the same GPU, for as long as it takes."""
        self._hold_s = math.inf if sleeps else HOLD_LIMIT_S if hold_s is None else hold_s
        self._sleeps = sleeps
        self._run, self._worker = run, worker
        self._engine, self._live, self._weights, self._outbox = engine, live, weights, outbox
        self._cuts = CutState()
        self._news = asyncio.Event()
        self._requested_at = 0.0
        self._reached: int | None = None
        self._looked_at = self._silent_since = 0.0

    @property
    def cut(self) -> int | None:
        """The cut for which the worker is paused, or will pause; None if there is none."""
        return self._cuts.open.cut if self._cuts.open is not None else None

    async def join(self, alive: WorkerAlive) -> None:
        """Put a first heartbeat on the log, if engines sleep. Call it before the first read of `control`.

        Then either this worker reads a request of the learner before it starts its engine, or the learner reads the
        heartbeat after its request, and waits for the answer.
        """
        if self._sleeps:
            self._outbox.put_from_worker(alive)
            await self._outbox.flush()

    def observe(self, message: Control) -> None:
        """Note the next record of `control`, in the log's order. It takes effect with the next `apply`."""
        if isinstance(message, CutRequested):
            self._requested_at = time.monotonic()
        self._cuts.observe(message)

    def apply(self) -> None:
        """Act on the records noted so far: they are up to date, no older records remain to be read."""
        self._start_hold_timer()
        self._news.set()

    def note_end_of_log(self) -> None:
        """Note that the log is read to its end. If the learner was silent for the hold limit, end the hold."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at > ANSWER_S:
            self._silent_since = now
        self._looked_at = now
        if self.cut is not None and self.cut == self._reached and now - self._silent_since >= self._hold_s:
            self._end_hold()

    async def serve(self) -> None:
        """Reach each requested cut and release its hold when it is over, in an endless loop.

        Raises UserError if the engine refuses a step.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            request = self._cuts.open
            if request is not None and request.cut != self._reached:
                with required(f"cut {request.cut} of version {request.version}"):
                    await self._pause_and_report(request)
                self._reached = request.cut
                self._start_hold_timer()
            elif request is None:
                with required("to resume after a cut"):
                    await self._weights.release_hold(self._cuts.held)

    async def _pause_and_report(self, request: CutRequested) -> None:
        """Pause the engine, and report the cut as reached once all sampled tokens are on the log."""
        async with self._weights.paused_for_cut(request.version):
            pause_s = time.monotonic() - self._requested_at
            version = self._weights.verified
            failpoints.reach("rollout.at_cut")
            flushed = await self._flush(request)
            if self._sleeps:
                await self._engine.sleep()  # before the answer, upon which the learner computes
        await self._outbox.flush()
        failpoints.reach("rollout.after_flush")
        self._outbox.put_from_worker(
            CutReached(
                run=self._run,
                worker=self._worker,
                cut=request.cut,
                version=version,
                positions=dict(self._outbox.positions),
                flushed=flushed,
                pause_s=pause_s,
            )
        )
        instruments.CUT_PAUSE_SECONDS.observe(pause_s)
        instruments.FLUSHED.inc(flushed)
        logger().info("cut", cut=request.cut, version=version, flushed=flushed, pause_ms=round(1e3 * pause_s, 1))

    async def _flush(self, request: CutRequested) -> int:
        """Flush every trajectory in flight. Return how many had tokens to flush."""
        flushed = 0
        for live in tuple(self._live):
            so_far = await self._partial_trajectory(live)
            if live not in self._live:
                continue  # it ended meanwhile: its complete record is in the outbox
            record = flush(live, so_far, request=request, worker=self._worker)
            if record is not None:
                live.flushed = len(so_far.tokens)
                self._outbox.put_flush(record)
                flushed += 1
        return flushed

    async def _partial_trajectory(self, live: InFlightTrajectory) -> TrajectoryBuilder:
        """Return the trajectory with the tokens sampled so far of its message in flight."""
        while True:
            request = live.request
            partial = await self._engine.partial(request) if request is not None else None
            if live.request == request:  # else the message ended during the call
                return live.assembly.with_partial(partial)

    def _start_hold_timer(self) -> None:
        """Start the time limit for the learner's next record."""
        self._looked_at = self._silent_since = asyncio.get_running_loop().time()

    def _end_hold(self) -> None:
        instruments.HOLDS_GIVEN_UP.inc()
        logger().warning(
            "cut hold timed out", cut=self.cut, version=self._cuts.held, seconds=self._hold_s,
            consequence="resumes sampling; tokens sampled with this version are not scored",
        )  # fmt: skip
        self._cuts.release()
        self._news.set()
