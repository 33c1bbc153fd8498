"""Bit-exact compression of arrays of numbers.

A *base* frame holds one complete tensor. The encoder groups bytes of equal significance into planes (plane 0: the
lowest byte of every number) and compresses the planes with zstd. In bf16 weights the upper plane, sign and exponent, is
repetitive and compresses well; the lower plane does not compress.
"""

import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_FREQUENCIES = zstandard.ZstdCompressionParameters(
    window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
"""Finds next to no repeated sequences, so that nearly all bytes are Huffman-coded."""


_LOCAL = threading.local()


def encode_base(raw: Bytes, *, itemsize: int, level: int) -> bytes:
    """Return one zstd frame with the byte planes of `raw`, [n * itemsize] uint8, little-endian numbers."""
    planes = np.ascontiguousarray(raw.reshape(-1, itemsize).T)
    return zstandard.ZstdCompressor(level=level).compress(planes.data)


def decode_base(frame: bytes, *, itemsize: int, size: int) -> Bytes:
    """Return the `size` bytes that encode_base got. Raises ValueError if the frame holds another number of bytes."""
    raw = _decompress(frame, size)
    planes = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)


def pack(numbers: NDArray[Any], *, level: int | None = None) -> bytes:
    """Return the byte planes of the numbers, each a 4-byte length and one zstd frame; length 0: every byte is 0.

    level: zstd level; None: only the frequencies of bytes are coded. That is faster, and smaller for planes without
    repeated sequences, as those of differences and gaps are.
    """
    compressor = zstandard.ZstdCompressor(
        compression_params=_FREQUENCIES if level is None else zstandard.ZstdCompressionParameters.from_level(level)
    )
    parts = []
    for plane in np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize).T:
        body = compressor.compress(np.ascontiguousarray(plane).data) if plane.any() else b""
        parts += [len(body).to_bytes(4, "little"), body]
    return b"".join(parts)


def unpack(packed: memoryview, *, itemsize: int, count: int) -> tuple[NDArray[Any], memoryview]:
    """Return the `count` unsigned numbers of `itemsize` bytes that `pack` got, and the bytes after them.

    Raises ValueError if a plane is truncated, damaged or of another size. Memory: that of the numbers.
    """
    numbers, end = np.zeros((count, itemsize), dtype=np.uint8), 0
    for plane in range(itemsize):
        start = end + 4
        length = int.from_bytes(packed[end:start], "little")
        end = start + length
        body = packed[start:end]
        if len(body) != length:
            raise ValueError(f"plane {plane} is truncated")
        if length:
            numbers[:, plane] = np.frombuffer(_decompress(body, count), dtype=np.uint8)
    return numbers.reshape(-1).view(f"<u{itemsize}"), packed[end:]


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return that of this thread: to make one takes longer than a small frame."""
    if not hasattr(_LOCAL, "decompressor"):
        _LOCAL.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _LOCAL.decompressor
    return found


def _decompress(frame: bytes | memoryview, size: int) -> bytes:
    """Return the `size` bytes of the zstd frame. Raises ValueError."""
    try:
        content_size = zstandard.frame_content_size(frame)
        if content_size != size:  # before decompressing: a damaged header may request any amount of memory
            raise ValueError(f"the frame holds {content_size} bytes, expected {size}")
        return _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a complete zstd frame: {error}") from error
