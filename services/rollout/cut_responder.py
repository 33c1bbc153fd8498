"""The worker's side of a cut: stand still, send ahead what was sampled, say so, and hold until the log says more.

The learner scores a version's tokens with the weights it still has, before it changes them. So none may be sampled
behind its back: from the answer on, nothing is sampled with the cut's version, or an older one, until a record behind
the request says how things go on (docs/algorithms/interruption.md).
"""

import asyncio
import time
from collections.abc import Sequence

from palimpsest.common import failpoints
from palimpsest.common.logs import logger
from palimpsest.common.messages import Control, CutReached, CutRequested
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.cut_state import CutState, flush
from palimpsest.services.rollout.engine.port import Engine
from palimpsest.services.rollout.engine.required import required
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder
from palimpsest.services.rollout.weights import WeightSync

HOLD_LIMIT_S = 120.0
"""When the learner says nothing for so long, it is taken for gone and the worker samples on. What it then samples with
the cut's version is not scored: a learner that comes back drops it, with a reason."""
ANSWER_S = 5.0
"""Between two looks at the log. When it took longer, the log or this process stood still: nobody could have been heard,
and the learner has its time anew."""


class CutResponder:
    """Serves the cuts of one worker. `live`: its trajectories under way."""

    def __init__(
        self,
        *,
        run: str,
        worker: str,
        engine: Engine,
        live: Sequence[InFlightTrajectory],
        weights: WeightSync,
        outbox: Outbox,
    ) -> None:
        self._run, self._worker = run, worker
        self._engine, self._live, self._weights, self._outbox = engine, live, weights, outbox
        self._cuts = CutState()
        self._news = asyncio.Event()
        self._requested_at = 0.0
        self._reached: int | None = None
        self._looked_at = self._silent_since = 0.0

    @property
    def cut(self) -> int | None:
        """The cut for which the worker stands still, or is about to; None: it need not."""
        return self._cuts.open.cut if self._cuts.open is not None else None

    def heard(self, message: Control) -> None:
        """The next record of `control`, in the log's order. Nothing comes of it before `apply`."""
        if isinstance(message, CutRequested):
            self._requested_at = time.monotonic()
        self._cuts.observe(message)

    def apply(self) -> None:
        """What was heard is how things stand now, not history that more follows on."""
        self._start_hold_timer()
        self._news.set()

    def heard_all(self) -> None:
        """The log answers, and nothing stands on it that was not heard: if the worker holds, the learner is silent."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at > ANSWER_S:
            self._silent_since = now
        self._looked_at = now
        if self.cut is not None and self.cut == self._reached and now - self._silent_since >= HOLD_LIMIT_S:
            self._end_hold()

    async def serve(self) -> None:
        """Reach the cut that is asked for and let go when it is over; for ever. Raises UserError if the engine does."""
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
                with required("to go on after a cut"):
                    await self._weights.release_hold(self._cuts.held)

    async def _pause_and_report(self, request: CutRequested) -> None:
        """Stand still, and say so once all that was sampled is on the log."""
        async with self._weights.paused_for_cut(request.version):
            pause_s = time.monotonic() - self._requested_at
            version = self._weights.verified
            failpoints.reach("rollout.at_cut")
            flushed = await self._flush(request)
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
        """Send ahead what every live trajectory has; of how many there was anything to send."""
        flushed = 0
        for live in tuple(self._live):
            so_far = await self._partial_trajectory(live)
            if live not in self._live:
                continue  # it ended meanwhile: its record is in the outbox, whole
            record = flush(live, so_far, request=request, worker=self._worker)
            if record is not None:
                live.flushed = len(so_far.tokens)
                self._outbox.put_flush(record)
                flushed += 1
        return flushed

    async def _partial_trajectory(self, live: InFlightTrajectory) -> TrajectoryBuilder:
        """The trajectory with its message under way, as far as it has come."""
        while True:
            request = live.request
            partial = await self._engine.partial(request) if request is not None else None
            if live.request == request:  # else the message ended while the engine was asked
                return live.assembly.with_partial(partial)

    def _start_hold_timer(self) -> None:
        """From now on it would be the learner's turn to say something."""
        self._looked_at = self._silent_since = asyncio.get_running_loop().time()

    def _end_hold(self) -> None:
        instruments.HOLDS_GIVEN_UP.inc()
        logger().warning(
            "cut hold timed out", cut=self.cut, version=self._cuts.held, seconds=HOLD_LIMIT_S,
            consequence="samples on; what it samples with this version is not scored",
        )  # fmt: skip
        self._cuts.release()
        self._news.set()
