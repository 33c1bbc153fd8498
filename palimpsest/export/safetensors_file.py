"""A safetensors file that is written tensor by tensor, so that memory holds one tensor at a time.

The safetensors library writes only complete files. Format: the length of the header (8 bytes, little-endian), a JSON
header with dtype, shape and offsets of each tensor, and the bytes without gaps. Wide dtypes come first, so every
tensor is aligned.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
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
"""Torch dtype name -> safetensors dtype name."""
ALIGNMENT = 8


class SafetensorsFile:
    """Writes the header on creation, and each tensor at its offset. The caller opens and closes the file."""

    def __init__(
        self, file: BinaryIO, tensors: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """metadata: for the header, beside the format."""
        self._file, self._places = file, dict[str, int]()
        header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
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
        """Write a tensor at its offset."""
        self._file.seek(self._data + self._places[tensor.name])
        self._file.write(tensor.raw.data)

    def sync(self) -> None:
        """Flush the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
