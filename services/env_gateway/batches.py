"""Steps of several sessions in one request. Each is taken as if it were alone, at the same time as the others."""

import asyncio
from collections.abc import AsyncIterator

import msgspec

from palimpsest.common.control.errors import HttpError
from palimpsest.common.logs import logger
from palimpsest.common.sessions import instruments
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.common.sessions.wire import BatchedStep, TakeSteps


async def take_all(sessions: Sessions, batch: TakeSteps) -> AsyncIterator[bytes]:
    """Take the steps; yield the JSON of each StepOutcome as soon as it is known, without a slow step holding others.

    A client that leaves does not cancel a step: its retry gets the stored reply.
    """
    running = [asyncio.create_task(_outcome(sessions, index, step)) for index, step in enumerate(batch.steps)]
    for outcome in asyncio.as_completed(running):
        yield await outcome


async def _outcome(sessions: Sessions, index: int, step: BatchedStep) -> bytes:
    try:
        reply = await sessions.step(step.session_id, step)
    except HttpError as error:
        body = error.body
    except Exception:
        logger().error("step failed", session=step.session_id, exc_info=True)
        body = {"code": "internal", "message": "the gateway failed; the traceback is in its log", "retryable": False}
    else:
        return b'{"index":%d,"result":%b}' % (index, reply)
    instruments.REFUSED.labels(body["code"]).inc()
    return b'{"index":%d,"refusal":%b}' % (index, msgspec.json.encode(body))
