"""Number arrays as bytes on the wire: little-endian, without a header. The byte count gives the length."""

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


def pack_int32(values: "Int32Array | list[int]") -> bytes:
    """Return the values as 4-byte integers. Raises OverflowError for a value that does not fit."""
    array = np.asarray(values)
    packed = array.astype(_INT32)
    if not np.array_equal(packed, array):  # numpy silently wraps values that do not fit
        raise OverflowError("a value is not a 4-byte integer")
    return packed.tobytes()


def unpack_int32(packed: bytes) -> Int32Array:
    """Return a read-only view of the values. Raises ValueError if the length is not a multiple of 4."""
    return np.frombuffer(packed, dtype=_INT32)


def pack_float32(values: "Float32Array | list[float]") -> bytes:
    """Return the values as 4-byte floats."""
    return np.asarray(values, dtype=_FLOAT32).tobytes()


def unpack_float32(packed: bytes) -> Float32Array:
    """Return a read-only view of the values. Raises ValueError if the length is not a multiple of 4."""
    return np.frombuffer(packed, dtype=_FLOAT32)
