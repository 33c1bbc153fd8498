"""Simulated time: an event loop whose clock jumps to the next event, and synchronous code that runs in it.

A call that a coroutine hands to a thread (`asyncio.to_thread`) runs after a latency, and its result arrives after
another latency. Synchronous code that waits is an `Actor`: it has a thread, which runs only while the loop pauses. So
only one thing happens at a time, and a seed repeats a run exactly.
"""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from typing import Any

from palimpsest.common.bus.port import Record
from tests.simulation.memory_bus import Store


class Stuck(AssertionError):
    """No event is left."""


class Killed(BaseException):
    """Ends an actor in the middle of a wait, or a call of a dead process."""


class NotYet(BaseException):
    """Raised instead of waiting in a thread: `subscribe` registers a callback that retries the call."""

    def __init__(self, subscribe: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.subscribe = subscribe


class SimulatedLoop(asyncio.BaseEventLoop):
    """Event loop in simulated time. `latency`: seconds between a coroutine and its thread, each way."""

    def __init__(self, latency: Callable[[], float]) -> None:
        super().__init__()
        self._now, self._latency = 0.0, latency
        self._selector = self
        self.actors: list[Actor] = []

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> tuple[()]:
        """Advance the clock to the next timer; there is no I/O."""
        if timeout is None:
            raise Stuck("no timer is pending: all tasks wait for each other")
        self._now += max(0.0, timeout)
        return ()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Run the call in this thread, as an event of its own."""
        future = self.create_future()
        self.call_later(self._latency(), self._attempt, future, func, args)
        return future

    def _attempt(self, future: "asyncio.Future[Any]", func: Callable[..., Any], args: Sequence[Any]) -> None:
        if future.cancelled():
            return
        try:
            settle, outcome = future.set_result, func(*args)
        except NotYet as wait:
            wait.subscribe(lambda: self._attempt(future, func, args))
            return
        except Killed:  # a dead process does not wait for its calls
            future.cancel()
            return
        except Exception as error:
            settle, outcome = future.set_exception, error
        self.call_later(self._latency(), lambda: future.done() or settle(outcome))

    def _process_events(self, events: Any) -> None: ...

    def _write_to_self(self) -> None: ...


class Actor:
    """Synchronous code in simulated time: `body` runs on a separate thread and waits by `sleep`."""

    here = threading.local()
    """`here.actor`: the actor of the present thread, if any."""

    def __init__(self, loop: SimulatedLoop, body: Callable[[], None]) -> None:
        self.loop = self._loop = loop
        self._body = body
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._wait = itertools.count()
        self._awaited: int | None = None
        self._killed = self._suspended = self._missed = False
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when `body` returns; holds its exception."""
        self._context: Context = copy_context()
        self._thread = threading.Thread(target=self._context.run, args=(self._live,), daemon=True)
        self._thread.start()
        loop.actors.append(self)
        loop.call_soon(self._turn)

    def sleep(self, seconds: float, subscribe: Callable[[Callable[[], None]], None] = lambda _: None) -> None:
        """On the actor's thread: wait for `seconds`, or until the subscribed callback is called."""
        self._awaited = number = next(self._wait)
        self._loop.call_later(seconds, self._wake, number)
        subscribe(lambda: self._wake(number))
        self._back.release()
        self._go.acquire()
        if self._killed:
            raise Killed

    def kill(self) -> None:
        """End the actor at its present wait."""
        if not self.ended.done():
            self._killed = True
            self._turn()

    def suspend(self, seconds: float) -> None:
        """Pause the actor for `seconds`."""
        self._suspended = True
        self._loop.call_later(seconds, self.resume)

    def resume(self) -> None:
        """End a pause."""
        self._suspended = False
        if self._missed:
            self._missed = False
            self._turn()

    def _wake(self, number: int) -> None:
        if number == self._awaited:
            self._awaited = None
            self._missed = self._suspended
            if not self._suspended:
                self._turn()

    def _turn(self) -> None:
        if not self.ended.done():
            self._go.release()
            self._back.acquire()

    def _live(self) -> None:
        Actor.here.actor = self
        self._go.acquire()
        try:
            if not self._killed:
                self._body()
            self.ended.set_result(None)
        except Killed:
            self.ended.set_result(None)
        except BaseException as error:
            self.ended.set_exception(error)
        self._back.release()


class SimulatedStore(Store):
    """A log in memory on the loop's clock.

    `note` receives every publication: topic and records. `fewer` returns how many of `limit` records a poll without
    waiting gets. Until `silent_until()` of the present process polls return nothing and all other calls wait;
    `silent_until` raises Killed for a dead process.
    """

    def __init__(
        self,
        loop: SimulatedLoop,
        note: Callable[[str, Sequence[Record]], None],
        fewer: Callable[[int], int],
        silent_until: Callable[[], float],
    ) -> None:
        super().__init__(clock=loop.time, change=contextlib.nullcontext())  # type: ignore[arg-type]
        self._loop, self._note, self._fewer, self._silent_until = loop, note, fewer, silent_until
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def look_again(self) -> None:
        """Wake all calls that wait for records."""
        for topic in list(self._waiting):
            self._call(topic)

    def on_access(self) -> None:
        while (left := self._silent_until() - self._loop.time()) > 0:
            actor = getattr(Actor.here, "actor", None)
            if actor is None:
                raise NotYet(lambda again: self._loop.call_later(left, again))
            actor.sleep(left)

    def available(self, limit: int, timeout_s: float) -> int:
        if self._silent_until() > self._loop.time():
            return 0
        return limit if timeout_s else self._fewer(limit)

    def wait(self, topic: str, timeout_s: float) -> None:
        def subscribe(callback: Callable[[], None]) -> None:
            self._waiting.setdefault(topic, []).append(callback)

        actor = getattr(Actor.here, "actor", None)
        if actor is not None:
            actor.sleep(timeout_s, subscribe)
            return
        raise NotYet(lambda again: _once(again, subscribe, lambda late: self._loop.call_later(timeout_s, late)))

    def published(self, topic: str, records: Sequence[Record]) -> None:
        self._note(topic, records)
        self._call(topic)

    def _call(self, topic: str) -> None:
        for callback in self._waiting.pop(topic, ()):
            self._loop.call_soon(callback)


def _once(callback: Callable[[], None], *subscriptions: Callable[[Callable[[], None]], Any]) -> None:
    """Call the callback once, at the first of these events."""
    called = False

    def first() -> None:
        nonlocal called
        if not called:
            called = True
            callback()

    for subscribe in subscriptions:
        subscribe(first)


def run(main: Callable[[SimulatedLoop], Any], latency: Callable[[], float]) -> Any:
    """Run the coroutine function in a new loop and return its result; end all remaining tasks and actors."""
    loop = SimulatedLoop(latency)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        for actor in loop.actors:
            actor.kill()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
