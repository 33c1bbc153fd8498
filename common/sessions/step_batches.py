"""Collects the steps that a worker takes at the same moment into one request.

An engine finishes many messages in one of its steps, so many sessions take a step at once. A batch is only a shorter
way: a step that gets no outcome from it is sent alone, with all retries. Numbers make that safe.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp

from palimpsest.common.sessions.port import SessionFailed
from palimpsest.common.sessions.wire import MAX_BATCH, BatchedStep, Step, StepOutcome

MAX_BYTES = 2**18
"""Maximum length of the texts of a batch, in characters: a fraction of the gateway's default request_limit_bytes."""


@dataclass(frozen=True, slots=True)
class _QueuedStep:
    step: BatchedStep
    length: int
    result: "asyncio.Future[Step]"


class StepBatches:
    """Steps that wait for the end of this turn of the event loop, and the requests in progress."""

    def __init__(
        self,
        send: Callable[[Sequence[BatchedStep]], AsyncIterator[StepOutcome]],
        send_alone: Callable[[BatchedStep], Awaitable[Step]],
    ) -> None:
        """send: yields outcomes as they arrive, possibly not all. send_alone: the step with retries."""
        self._send, self._send_alone = send, send_alone
        self._queue: list[_QueuedStep] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def step(self, step: BatchedStep, *, length: int) -> Step:
        """Take a step, together with the others of this turn of the event loop. Raises SessionFailed."""
        loop = asyncio.get_running_loop()
        waiting = _QueuedStep(step, length, loop.create_future())
        self._queue.append(waiting)
        if len(self._queue) == 1:
            loop.call_soon(self._flush)
        return await waiting.result

    async def close(self) -> None:
        """Cancel the requests in progress."""
        for sending in self._sending:
            sending.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    def _flush(self) -> None:
        queued, self._queue = self._queue, []
        for batch in split(queued):
            sending = asyncio.create_task(self._deliver(batch))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _deliver(self, batch: list[_QueuedStep]) -> None:
        left = dict(enumerate(batch))
        if len(batch) > 1:
            try:
                async for outcome in self._send([waiting.step for waiting in batch]):
                    if outcome.refusal is None or not outcome.refusal.retryable:
                        _resolve(left.pop(outcome.index), outcome)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
                pass  # the steps without an outcome follow alone; that request reports the outage
        await asyncio.gather(*map(self._deliver_alone, left.values()))

    async def _deliver_alone(self, waiting: _QueuedStep) -> None:
        try:
            step = await self._send_alone(waiting.step)
        except Exception as error:
            if not waiting.result.done():
                waiting.result.set_exception(error)
        else:
            if not waiting.result.done():
                waiting.result.set_result(step)


def split(queued: Sequence[_QueuedStep]) -> list[list[_QueuedStep]]:
    """Return the batches: in order, each of at most MAX_BATCH steps, and MAX_BYTES unless it is a single step."""
    batches: list[list[_QueuedStep]] = []
    length = 0
    for waiting in queued:
        if not batches or len(batches[-1]) == MAX_BATCH or length + waiting.length > MAX_BYTES:
            batches.append([])
            length = 0
        batches[-1].append(waiting)
        length += waiting.length
    return batches


def _resolve(waiting: _QueuedStep, outcome: StepOutcome) -> None:
    if waiting.result.done():  # its caller was cancelled
        return
    if outcome.result is not None:
        waiting.result.set_result(outcome.result)
    elif outcome.refusal is not None:
        waiting.result.set_exception(SessionFailed(outcome.refusal.code, f"POST /v1/steps: {outcome.refusal.message}"))
    else:
        raise ValueError("an outcome has neither a result nor a refusal")
