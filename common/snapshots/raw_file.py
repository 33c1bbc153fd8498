"""The tensors of a version in a local file, as raw bytes one after another, in the order of the manifest's entries."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from palimpsest.common.files import with_filename
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import Manifest, TensorEntry


class RawFile:
    """A WeightsCopy (walker.py) in a file. The system keeps as much of it in memory as fits.

    The file is of a version only while its Walker has a manifest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str, str, tuple[int, ...]], slice] = {}
        self._raw: Bytes = np.zeros(0, dtype=np.uint8)

    def load(self, tensors: Iterator[RawTensor], manifest: Manifest) -> None:
        """See WeightsCopy. Raises OSError if the disk is full."""
        start = 0
        self._places = {}
        for entry in manifest.tensors:
            self._places[_key(entry)] = slice(start, start + entry.size)
            start += entry.size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._raw = np.zeros(0, dtype=np.uint8)  # closes the earlier mapping
        with with_filename(self.path), self.path.open("w+b") as file:
            for tensor in tensors:
                file.seek(self._places[tensor.name, tensor.dtype, tensor.shape].start)
                file.write(tensor.raw.data)
            file.truncate(start)
            file.flush()
            if start:  # an empty file cannot be mapped
                self._raw = np.frombuffer(mmap.mmap(file.fileno(), start), dtype=np.uint8)

    @contextmanager
    def editing(self, entry: TensorEntry) -> Iterator[Bytes]:
        """See WeightsCopy."""
        place = self._places.get(_key(entry))
        if place is None:
            raise ValueError(f"the version in {self.path.name} has no tensor {entry.name} {entry.dtype} {entry.shape}")
        yield self._raw[place]

    def has_order_of(self, manifest: Manifest) -> bool:
        """Whether the tensors lie in the file in the order of this manifest."""
        start = 0
        for entry in manifest.tensors:
            if self._places.get(_key(entry)) != slice(start, start + entry.size):
                return False
            start += entry.size
        return True

    def sort_as(self, manifest: Manifest) -> None:
        """Write the file again, in the order of this manifest. The tensors must be those of the version in the file.

        A learner that continues on another number of ranks divides the tensors differently: its deltas have another
        order than the base before them. Raises OSError if the disk is full.
        """
        other = RawFile(self.path.with_name(f"{self.path.name}.sorted"))
        other.load(self.tensors(manifest), manifest)
        other.path.replace(self.path)
        self._places, self._raw = other._places, other._raw

    def tensors(self, manifest: Manifest) -> Iterator[RawTensor]:
        """Iterate over the tensors of the version in the file, in the order of the manifest."""
        for entry in manifest.tensors:
            with self.editing(entry) as raw:
                yield RawTensor(entry.name, entry.dtype, entry.shape, raw)


def _key(entry: TensorEntry) -> tuple[str, str, tuple[int, ...]]:
    return entry.name, entry.dtype, entry.shape
