"""Slices: parts of a tensor, each encoded by itself, in full or as the change from the version before.

A slice is a run of a tensor's numbers in C order. It has a header and a body. The encoder takes the smallest kind:

    SAME     no body: every number is equal to the parent's
    SPARSE   the gaps between the numbers that changed, and their differences
    CHANGE   the difference of every number
    DENSE    the numbers themselves

A difference is that of the bit patterns as unsigned integers, modulo their range, so it is exact for every type and
every NaN; one slice moves the numbers from the parent to the child or back. It is stored as 2 * d for d >= 0 and
-2 * d - 1 else. Optimizer steps change most bf16 weights to a neighbor, whose difference is 1 or -1: one bit, where
the XOR of the two patterns takes two bits on average (docs/decisions/0025-versions-as-deltas.md).

Slices are independent of each other. Ranks that hold parts of a tensor can each encode their own part.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.snapshots.codec import Bytes, pack, unpack

SLICE_BYTES = 4 << 20
"""Length of a slice before encoding, in bytes: a few milliseconds of work."""
HEADER = struct.Struct("<BBHIQI")
"""Kind, bytes per number, zero, number of numbers, index of the first one in the tensor, bytes of the body."""
_SPARSE_SHARE = 0.5
"""Share of changed numbers up to which SPARSE is smaller than CHANGE (docs/decisions/0025)."""
_DENSE_SHARE = 0.5
"""Share of changed numbers from which DENSE may be smaller than CHANGE."""


class SliceKind(IntEnum):
    """How a slice is encoded."""

    SAME = 0
    SPARSE = 1
    CHANGE = 2
    DENSE = 3


@dataclass(frozen=True, slots=True)
class Slice:
    """An encoded slice."""

    kind: SliceKind
    itemsize: int
    start: int
    """Index of its first number in the tensor."""
    count: int
    body: bytes | memoryview

    @property
    def size(self) -> int:
        """Bytes of the header and the body."""
        return HEADER.size + len(self.body)

    def encoded(self) -> bytes:
        """Return the header and the body."""
        return HEADER.pack(self.kind, self.itemsize, 0, self.count, self.start, len(self.body)) + self.body


def ranges(numbers: int, itemsize: int) -> list[tuple[int, int]]:
    """Return the [start, stop) of the slices of a tensor with this many numbers.

    >>> ranges(5 << 20, 2)
    [(0, 2097152), (2097152, 4194304), (4194304, 5242880)]
    """
    step = SLICE_BYTES // itemsize
    return [(start, min(start + step, numbers)) for start in range(0, numbers, step)]


def encode_slice(raw: Bytes, parent: Bytes | None, *, itemsize: int, start: int, level: int) -> Slice:
    """Encode the bytes of a slice. `parent`: the same slice of the parent version; None: encode it in full.

    raw, parent: [count * itemsize] uint8, little-endian numbers. level: zstd level of DENSE.
    """
    new = _numbers(raw, itemsize)

    def slice_of(kind: SliceKind, body: bytes) -> Slice:
        return Slice(kind, itemsize, start, len(new), body)

    if parent is None:
        return slice_of(SliceKind.DENSE, pack(new, level=level))
    old = _numbers(parent, itemsize)
    if len(old) != len(new):
        raise ValueError(f"the parent's slice has {len(old)} numbers, not {len(new)}")
    places = np.flatnonzero(new != old)
    if not len(places):
        return slice_of(SliceKind.SAME, b"")
    share = len(places) / len(new)
    if share <= _SPARSE_SHARE:
        gaps = (np.diff(places, prepend=-1) - 1).astype(np.uint32)
        changes = _folded(new[places] - old[places])
        return slice_of(SliceKind.SPARSE, len(places).to_bytes(4, "little") + pack(gaps) + pack(changes))
    change = pack(_folded(new - old))
    if share >= _DENSE_SHARE and len(dense := pack(new, level=level)) < len(change):
        return slice_of(SliceKind.DENSE, dense)
    return slice_of(SliceKind.CHANGE, change)


def apply_slice(encoded: Slice, target: Bytes, *, back: bool = False, within: tuple[int, int] | None = None) -> None:
    """Move the bytes of a slice in place from the parent to the child, or with `back` from the child to the parent.

    target: [count * itemsize] uint8, writable. within: the [start, stop) of the slice's numbers that the target holds;
    None: all of them. Raises ValueError if the slice is damaged or cannot be applied; the
    target then may hold other bytes than those of a version, unless the kind is DENSE.
    """
    numbers, body = _numbers(target, encoded.itemsize), memoryview(encoded.body)
    first, last = within or (0, encoded.count)
    if len(numbers) != last - first:
        raise ValueError(f"the slice has {last - first} numbers, its target {len(numbers)}")
    if encoded.kind is SliceKind.SAME:
        _end(body)
    elif encoded.kind is SliceKind.SPARSE:
        places, changes = sparse(encoded)
        if within is not None:
            inside = slice(*np.searchsorted(places, within))
            places, changes = places[inside] - first, changes[inside]
        (np.subtract if back else np.add).at(numbers, places, changes)  # faster than to gather and to scatter
    elif encoded.kind is SliceKind.CHANGE:
        change, rest = unpack(body, itemsize=encoded.itemsize, count=encoded.count)
        _end(rest)
        if back:
            numbers -= _unfolded(change[first:last])
        else:
            numbers += _unfolded(change[first:last])
    elif back:
        raise ValueError("a dense slice leads only forwards")
    else:
        dense, rest = unpack(body, itemsize=encoded.itemsize, count=encoded.count)
        _end(rest)
        numbers[:] = dense[first:last]


def sparse(encoded: Slice) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the indexes in the slice that a SPARSE slice changes, ascending, and the differences there.

    Raises ValueError if it is damaged.
    """
    body = memoryview(encoded.body)
    changed = int.from_bytes(body[:4], "little")
    if not 0 < changed <= encoded.count:
        raise ValueError(f"the slice changes {changed} of {encoded.count} numbers")
    gaps, body = unpack(body[4:], itemsize=4, count=changed)
    changes, body = unpack(body, itemsize=encoded.itemsize, count=changed)
    _end(body)
    places = gaps.astype(np.int64)
    places += 1
    places[0] -= 1
    np.add.accumulate(places, out=places)
    if places[-1] >= encoded.count:
        raise ValueError(f"the slice changes number {places[-1]} of {encoded.count}")
    return places, _unfolded(changes)


def slices_in(encoded: memoryview, *, numbers: int, itemsize: int) -> Iterator[Slice]:
    """Iterate over the slices of a tensor with `numbers` numbers. Raises ValueError unless they cover it exactly."""
    at = 0
    while encoded:
        if len(encoded) < HEADER.size:
            raise ValueError("the header of a slice is truncated")
        kind, width, zero, count, start, length = HEADER.unpack_from(encoded)
        body, encoded = encoded[HEADER.size : HEADER.size + length], encoded[HEADER.size + length :]
        known = kind < len(SliceKind) and width == itemsize and zero == 0
        if not known or start != at or not 0 < count <= SLICE_BYTES // itemsize:
            raise ValueError(f"a slice begins at number {start} in place of {at}, or its header is damaged")
        if len(body) != length:
            raise ValueError(f"the slice at number {start} is truncated")
        at += count
        if at > numbers:
            raise ValueError(f"the slice at number {start} ends at {at} of {numbers} numbers")
        yield Slice(SliceKind(kind), itemsize, start, count, body)
    if at != numbers:
        raise ValueError(f"the slices end at number {at} of {numbers}")


def _numbers(raw: Bytes, itemsize: int) -> NDArray[Any]:
    return raw.view(f"<u{itemsize}")


def _folded(change: NDArray[Any]) -> NDArray[Any]:
    """2 * d for a difference d >= 0, else -2 * d - 1: small for small differences of either sign."""
    signed = change.view(f"<i{change.itemsize}")
    folded: NDArray[Any] = ((signed << 1) ^ (signed >> (8 * change.itemsize - 1))).view(change.dtype)
    return folded


def _unfolded(folded: NDArray[Any]) -> NDArray[Any]:
    one = folded.dtype.type(1)
    change: NDArray[Any] = (folded >> one) ^ (~(folded & one) + one)
    return change


def _end(rest: memoryview) -> None:
    if rest:
        raise ValueError(f"{len(rest)} bytes follow the slice's last plane")
