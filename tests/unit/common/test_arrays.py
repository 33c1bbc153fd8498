"""Arrays of numbers packed as bytes."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.arrays import pack_float32, pack_int32, unpack_float32, unpack_int32

INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)


@settings(deadline=None)
@given(st.lists(INT32, max_size=50))
def test_int32_are_packed_as_the_struct_module_packs_them(values: list[int]) -> None:
    packed = pack_int32(values)
    assert packed == struct.pack(f"<{len(values)}i", *values)
    assert unpack_int32(packed).tolist() == values


@settings(deadline=None)
@given(st.lists(FLOAT32, max_size=50))
def test_float32_are_packed_as_the_struct_module_packs_them(values: list[float]) -> None:
    packed = pack_float32(values)
    assert packed == struct.pack(f"<{len(values)}f", *values)
    assert unpack_float32(packed).tolist() == values


def test_a_float64_is_rounded_to_the_nearest_float32() -> None:
    assert unpack_float32(pack_float32([0.1])).tolist() == [0.10000000149011612]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**80])
def test_an_integer_of_more_than_4_bytes_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        pack_int32([1, value])


def test_values_that_overflow_int32_are_refused() -> None:
    with pytest.raises(OverflowError, match="4-byte integer"):
        pack_int32(np.array([1, 2**32 + 7]))


def test_a_wider_array_whose_values_fit_is_packed() -> None:
    assert pack_int32(np.array([1, -2], dtype=np.int64)) == b"\x01\0\0\0\xfe\xff\xff\xff"


@pytest.mark.parametrize("unpack", [unpack_int32, unpack_float32])
def test_bytes_that_are_no_multiple_of_4_are_refused(unpack: object) -> None:
    assert callable(unpack)
    with pytest.raises(ValueError, match="multiple"):
        unpack(b"12345")


def test_unpacked_arrays_are_read_only() -> None:
    values = unpack_int32(pack_int32([1, 2]))
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 5
