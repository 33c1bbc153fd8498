"""Bit-exact encoding of weights.

A *base* frame holds one complete tensor. The encoder groups bytes of equal significance into planes (plane 0: the
lowest byte of every number) and compresses the planes with zstd. In bf16 weights the upper plane, sign and exponent, is
repetitive and compresses well; the lower plane does not compress.
"""

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def encode_base(raw: Bytes, *, itemsize: int, level: int) -> bytes:
    """Return one zstd frame with the byte planes of `raw`, [n * itemsize] uint8, little-endian numbers."""
    planes = np.ascontiguousarray(raw.reshape(-1, itemsize).T)
    return zstandard.ZstdCompressor(level=level).compress(planes.data)


def decode_base(frame: bytes, *, itemsize: int, size: int) -> Bytes:
    """Return the `size` bytes that encode_base got. Raises ValueError if the frame holds another number of bytes."""
    try:
        content_size = zstandard.frame_content_size(frame)
        if content_size != size:  # before decompressing: a damaged header may request any amount of memory
            raise ValueError(f"the frame holds {content_size} bytes, expected {size}")
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a complete zstd frame: {error}") from error
    planes = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)
