"""A thread beside the loop's, for one piece of work at a time."""

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Does one piece of work in a thread. The loop's thread calls every method."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work was begun that `collect` has not returned."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Whether the work that was begun has ended."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(self, work: Callable[[], T]) -> None:
        """Begin the work. Must not be called while another piece is not collected."""
        assert self._thread is None
        self._result, self._error = [], None
        # The process may end in the middle of the work, as by a crash: every step of it is safe then.
        self._thread = Thread(target=self._do, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the work has ended. Return whether it succeeded; without work, True. Raises nothing.

        timeout_s: longest wait, seconds; after it the work counts as failed.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or (self.done and self._error is None)

    def collect(self) -> T:
        """Wait until the work has ended. Return its result, or raise its error."""
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        (result,) = self._result
        return result

    def _do(self, work: Callable[[], T]) -> None:
        try:
            self._result.append(work())
        except BaseException as error:
            self._error = error
