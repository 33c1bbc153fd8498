"""A cache of computed values, bounded by the memory that keys and values take. Pure."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Keeps the values that were used last. Not thread-safe.

    >>> cache = ByteCache[str, str](most_bytes=8, size=lambda key, value: len(key) + len(value))
    >>> cache.get("a", lambda: "123"), cache.get("b", lambda: "123"), cache.bytes
    ('123', '123', 8)
    >>> cache.get("c", lambda: "1234"), cache.bytes  # "a" and "b" are forgotten
    ('1234', 5)
    >>> cache.get("d", lambda: "12345678"), cache.bytes  # too large to keep
    ('12345678', 5)
    """

    def __init__(self, *, most_bytes: int, size: Callable[[K, V], int]) -> None:
        """`size`: the bytes that a key and its value take."""
        self._most_bytes, self._size = most_bytes, size
        self._kept: OrderedDict[K, V] = OrderedDict()
        self.bytes = 0
        """Bytes that all kept keys and values take."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, compute: Callable[[], V]) -> V:
        """Return the value of the key, computed if it is not kept. Raises the errors of `compute`."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = compute()
        added = self._size(key, value)
        if added <= self._most_bytes:
            self._kept[key] = value
            self.bytes += added
            while self.bytes > self._most_bytes:
                self.bytes -= self._size(*self._kept.popitem(last=False))
        return value
