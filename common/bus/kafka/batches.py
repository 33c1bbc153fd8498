"""Reads batches of records that other programs wrote: compressed, too large once decompressed, or not readable.

kafka-python decompresses a batch whole, whatever its size, and raises an error that ends its reader for codecs that are
not installed and for header names that are not UTF-8. `install` replaces its class for batches by one that bounds the
size and returns one record without a body in place of an unreadable batch. Its header UNREADABLE gives the reason, so
that the reader dead-letters it. The offsets of the batch's other records are then a gap.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import zstandard
from kafka.errors import KafkaError
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch

from palimpsest.common.bus.port import UNREADABLE

MOST_BATCH_BYTES = 1 << 26
"""Longest decompressed batch. The writers of a run do not compress, so only a batch that a mirroring tool wrote can be
compressed, and it is about as long as `bus.max_record_bytes`."""
MOST_BATCH_RECORDS = 1 << 17
"""Most records of a batch. Reading them takes a second of processor time."""
GZIP = zlib.MAX_WBITS | 16


class _TooLong(ValueError):
    """Raised if a batch exceeds MOST_BATCH_BYTES once it is decompressed, or MOST_BATCH_RECORDS."""


class BoundedBatch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch whose records are read when the iteration begins."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        try:
            records = self._read_all()
        except (KafkaError, ValueError, IndexError, zlib.error, zstandard.ZstdError, NotImplementedError) as error:
            records = [self._unreadable(error)]
        return iter(records)

    def _read_all(self) -> list[Any]:
        if self._num_records > MOST_BATCH_RECORDS:
            raise _TooLong(f"it has {self._num_records} records; the limit is {MOST_BATCH_RECORDS}")
        batch: Any = self  # kafka-python declares no types
        if not batch._decompressed and (codec := batch.compression_type) in (self.CODEC_GZIP, self.CODEC_ZSTD):
            data = bytes(memoryview(batch._buffer)[batch._pos :])
            batch._buffer = bytearray(_gunzip(data) if codec == self.CODEC_GZIP else _unzstd(data))
            batch._pos, batch._decompressed = 0, True
        super().__iter__()  # refuses the codecs that are not installed
        records: list[Any] = []
        while self._next_record_index < self._num_records:
            records.append(super().__next__())
        return records

    def _unreadable(self, error: Exception) -> Any:
        reason = (
            f"the batch of offsets {self.base_offset} to {self.last_offset} cannot be read: "
            f"{type(error).__name__.lstrip('_')}: {error}"
        )
        headers = [(UNREADABLE, reason.encode())]
        return DefaultRecord(0, self.base_offset, self.first_timestamp, self.timestamp_type, b"", b"", headers)


def install() -> None:
    """Make kafka-python's consumers read batches with this class."""
    memory_records.DefaultRecordBatch = BoundedBatch


def _gunzip(data: bytes) -> bytes:
    """Decompress gzip data, which may consist of several members. Raises _TooLong, zlib.error."""
    parts: list[bytes] = []
    left = MOST_BATCH_BYTES + 1
    while data:
        member = zlib.decompressobj(GZIP)
        parts.append(member.decompress(data, left))
        left -= len(parts[-1])
        if left <= 0:
            raise _too_long()
        if not member.eof:
            raise zlib.error("the data is truncated")
        data = member.unused_data
    return b"".join(parts)


def _unzstd(data: bytes) -> bytes:
    """Decompress zstd data, which may consist of several frames. Raises _TooLong, ZstdError."""
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        read: bytes = reader.read(MOST_BATCH_BYTES + 1)
    if len(read) > MOST_BATCH_BYTES:
        raise _too_long()
    return read


def _too_long() -> _TooLong:
    return _TooLong(f"it has more than {MOST_BATCH_BYTES} bytes once decompressed, the limit")
