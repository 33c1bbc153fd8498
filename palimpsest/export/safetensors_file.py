"""A safetensors file that is filled tensor by tensor, so that memory holds one of them and not the file.

The library's own writers want every tensor of a file at once. The form: the header's length (8 bytes, little-endian),
a JSON header with each tensor's type, shape and place, and the bytes without gaps. Wide numbers come first, so that
each is aligned.
"""

import json
import os
import struct
from collections.abc import Sequence
from typing import BinaryIO

from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import ITEMSIZE, TensorEntry

DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""torch's name of a type -> the format's."""
ALIGNMENT = 8


class SafetensorsFile:
    """Writes the header at once and each tensor to its place; the caller opens and closes the file."""

    def __init__(self, file: BinaryIO, tensors: Sequence[TensorEntry]) -> None:
        self._file, self._places = file, dict[str, int]()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in sorted(tensors, key=lambda entry: -ITEMSIZE[entry.dtype]):
            header[entry.name] = {
                "dtype": DTYPES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": (start, start + entry.size),
            }
            self._places[entry.name] = start
            start += entry.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._data = file.write(struct.pack("<Q", len(text)) + text)

    def write(self, tensor: RawTensor) -> None:
        """Put a tensor into its place."""
        self._file.seek(self._data + self._places[tensor.name])
        self._file.write(tensor.raw.data)

    def sync(self) -> None:
        """Make what was written durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
