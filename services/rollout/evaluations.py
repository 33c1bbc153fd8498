"""The evaluation that a worker serves, and the groups that wait for its end."""

import asyncio
from collections.abc import Awaitable, Callable

from palimpsest.common.logs import logger
from palimpsest.common.messages import EvaluationEnded, EvaluationStarted, VersionPublished
from palimpsest.common.versions import Version


class WorkerEvaluations:
    """Follows the learner's evaluations.

    use: called with the version that the engine must keep, None to load the newest again. on_error: gets the error of a
    deferred group.
    """

    def __init__(
        self, use: Callable[[Version | None], Awaitable[None]], on_error: Callable[[BaseException], None]
    ) -> None:
        self._use, self._on_error = use, on_error
        self._started: EvaluationStarted | None = None
        self.deferred: set[asyncio.Task[None]] = set()
        """Groups of later versions."""

    async def observe(self, message: EvaluationStarted | EvaluationEnded | VersionPublished) -> None:
        """Follow the order of the records on topic `control`.

        A version of a later learner ends the evaluation of the one that it replaced: the later one starts it again.
        """
        started = self._started
        match message:
            case EvaluationStarted():
                self._started = message
                logger().info("evaluation", version=message.version)
            case EvaluationEnded() if started is not None and message.version == started.version:
                self._started = None
            case VersionPublished() if started is not None and message.writer > started.writer:
                self._started = None
        if self._started is not started:
            await self._use(None if self._started is None else self._started.version)

    def defer(self, version: Awaitable[None], start: Callable[[], Awaitable[None]]) -> None:
        """Start a group once its version is there."""

        async def start_later() -> None:
            await version
            await start()

        task = asyncio.create_task(start_later())
        self.deferred.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.deferred.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)
