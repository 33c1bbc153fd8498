"""The part of each version that a rank copies, encodes and uploads."""

import tempfile
from collections.abc import Collection
from typing import IO, cast

from palimpsest.common import failpoints
from palimpsest.common.files import with_filename
from palimpsest.common.snapshots.client import SnapshotClient, WithoutRoom
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.encoding import EncodedVersion, encode_version
from palimpsest.common.snapshots.frames import RawTensor


class VersionPart:
    """The tensors of a version that this rank stores, as an object of its own.

    Memory: a copy of them, and until the version is stored another one of the version before. The encoded object is in
    a temporary file.
    """

    def __init__(self, store: SnapshotClient, tensors: Collection[str], *, threads: int) -> None:
        """tensors: names of those that this rank stores. threads: that encode."""
        self.tensors = frozenset(tensors)
        self._store, self._threads = store, threads
        self._copy: list[RawTensor] = []
        self._parent: dict[str, Bytes] = {}
        self._file: IO[bytes] | None = None
        self._encoded, self._stored = EncodedVersion(), False

    @property
    def copied(self) -> list[RawTensor]:
        """The tensors of the version that is not stored yet."""
        return self._copy

    @property
    def held_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(len(raw) for raw in (*(tensor.raw for tensor in self._copy), *self._parent.values()))

    def take(self, tensors: list[RawTensor]) -> None:
        """Take over a copy of the tensors for the next version."""
        assert {tensor.name for tensor in tensors} == self.tensors
        self._copy = tensors

    def encode(self, *, delta: bool) -> EncodedVersion:
        """Encode the copy. delta: as the change from the version stored before. Raises OSError on a full disk."""
        self._close()
        with with_filename(tempfile.gettempdir()):
            self._file = cast("IO[bytes]", tempfile.TemporaryFile(prefix="palimpsest-put-"))  # noqa: SIM115, until `keep`
            before, level = self._parent if delta else None, self._store.compression
            self._encoded = encode_version(self._copy, before, self._file, level=level, threads=self._threads)
        self._stored = False
        failpoints.reach("learner.after_encoding")
        return self._encoded

    def send(self, *, again: bool = False) -> int:
        """Store the object, unless that was done. again: in any case. Return the bytes for which the store has no room;
        0 if it is stored."""
        assert self._file is not None
        self._stored = self._stored and not again  # without room now, it has to be sent when there is some
        if self._encoded.size and not self._stored:
            try:
                self._store.send_object(self._encoded.digest, self._encoded.size, self._file)
            except WithoutRoom:
                return self._encoded.size
        self._stored = True
        failpoints.reach("learner.after_storing_object")
        return 0

    def keep(self) -> None:
        """The version is stored: keep its tensors for the next delta, and release the others."""
        self._parent, self._copy = {tensor.name: tensor.raw for tensor in self._copy}, []
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
