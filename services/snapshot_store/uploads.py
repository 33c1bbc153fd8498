"""Which objects may still wait for their manifest."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

KEEP_S = 3600.0
"""Time for which an object without a manifest is kept after its upload, in seconds. Longer than a client retries."""


class Uploads:
    """The objects whose upload is in progress or ended less than `keep_s` ago, by the clock of this process."""

    def __init__(self, *, keep_s: float = KEEP_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s, self._clock = keep_s, clock
        self._active: Counter[str] = Counter()
        self._ended: dict[str, float] = {}
        self._sizes: dict[str, int] = {}

    @contextmanager
    def receiving(self, digest: str) -> Iterator[None]:
        """Mark the object as in progress inside the block."""
        self._active[digest] += 1
        try:
            yield
            self._ended[digest] = self._clock()
        finally:
            self._active[digest] -= 1
            self._active += Counter()  # drops zeros

    def stored(self, digest: str, size: int) -> None:
        """Note the bytes of an upload that ended."""
        self._sizes[digest] = size

    def forget(self, digest: str) -> None:
        """Stop waiting for a manifest of this object: it is stored or refused."""
        self._ended.pop(digest, None)

    def waiting(self) -> dict[str, int]:
        """Return the objects that are stored and wait for their manifest, and their bytes."""
        self.awaited()
        self._sizes = {digest: size for digest, size in self._sizes.items() if digest in self._ended}
        return dict(self._sizes)

    def awaited(self) -> set[str]:
        """Return the digests of the objects that a sweep must keep."""
        oldest = self._clock() - self._keep_s
        self._ended = {digest: ended for digest, ended in self._ended.items() if ended > oldest}
        return set(self._active) | set(self._ended)
