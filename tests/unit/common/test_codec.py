"""Encoding of weights."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots.codec import decode_base, encode_base

SMALL = np.frombuffer(bytes([10, 20, 11, 21, 12, 22]), dtype=np.uint8)
"""Three 2-byte numbers."""
FRAME = encode_base(SMALL, itemsize=2, level=3)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[bytes, int]:
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    count = draw(st.integers(0, 40))
    if draw(st.booleans()):
        return draw(st.binary(min_size=itemsize * count, max_size=itemsize * count)), itemsize
    return draw(st.binary(min_size=itemsize, max_size=itemsize)) * count * 200, itemsize  # compressible


@settings(deadline=None)
@given(tensors(), st.sampled_from([1, 3, 19]))
def test_every_tensor_is_read_bit_for_bit(tensor: tuple[bytes, int], level: int) -> None:
    raw, itemsize = tensor
    frame = encode_base(np.frombuffer(raw, dtype=np.uint8), itemsize=itemsize, level=level)
    assert decode_base(frame, itemsize=itemsize, size=len(raw)).tobytes() == raw


def test_bytes_of_equal_significance_are_adjacent() -> None:
    assert zstandard.ZstdDecompressor().decompress(FRAME) == bytes([10, 11, 12, 20, 21, 22])


@pytest.mark.parametrize("cut", range(len(FRAME)))
def test_a_truncated_frame_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="frame"):
        decode_base(FRAME[:cut], itemsize=2, size=6)


@pytest.mark.parametrize("padding", [b"\0", b"xyz", FRAME])
def test_a_frame_with_trailing_bytes_is_refused(padding: bytes) -> None:
    with pytest.raises(ValueError, match="not a complete zstd frame"):
        decode_base(FRAME + padding, itemsize=2, size=6)


@pytest.mark.parametrize("size", [0, 4, 8, 1 << 40])
def test_a_frame_of_another_size_is_refused_by_both_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"the frame holds 6 bytes, expected {size}"):
        decode_base(FRAME, itemsize=2, size=size)


@pytest.mark.parametrize("place", range(len(FRAME)))
def test_a_flipped_byte_is_refused_or_leads_to_other_bytes_of_the_same_size(place: int) -> None:
    """No crash and no excess memory; the tensor's digest detects bytes that decode differently."""
    for value in range(256):
        flipped = FRAME[:place] + bytes([value]) + FRAME[place + 1 :]
        try:
            assert len(decode_base(flipped, itemsize=2, size=6)) == 6
        except ValueError:
            continue
