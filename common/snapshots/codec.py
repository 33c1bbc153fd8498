"""Weights to bytes and back, bit-exact.

A *base* holds a tensor whole. The bytes of equal significance are put together first (plane 0 = the lowest byte of
every number, and so on): in bf16 weights the upper plane, sign and exponent, repeats itself and compresses well, the
lower one does not and costs nothing to find out.
"""

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def encode_base(raw: Bytes, *, itemsize: int, level: int) -> bytes:
    """One zstd frame holding the byte planes of `raw` ([n * itemsize] uint8, little-endian numbers)."""
    planes = np.ascontiguousarray(raw.reshape(-1, itemsize).T)
    return zstandard.ZstdCompressor(level=level).compress(planes.data)


def decode_base(frame: bytes, *, itemsize: int, size: int) -> Bytes:
    """The `size` bytes that encode_base was given. Raises ValueError when the frame does not hold as many."""
    try:
        holds = zstandard.frame_content_size(frame)
        if holds != size:  # before decompressing: a damaged header may ask for any amount of memory
            raise ValueError(f"the frame holds {holds} bytes, {size} are due")
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a whole zstd frame: {error}") from error
    planes = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)
