"""Slices: bit-exact in both directions, for every type and every share of change; damage is refused."""

import io

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots import slices
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import ITEMSIZE
from palimpsest.common.snapshots.slices import Slice, SliceKind, apply_slice, encode_slice, ranges, slices_in, sparse

NUMBERS = 600
Raw = np.ndarray


@st.composite
def steps(draw: st.DrawFn) -> tuple[Raw, Raw, int]:
    """Bytes before and after a step, and the bytes per number. Any bit patterns: NaNs, infinities, -0."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([1, 2, 7, NUMBERS]))
    before = random.integers(0, 256, count * itemsize, dtype=np.uint8)
    after = before.copy().view(f"<u{itemsize}")
    changed = random.random(count) < draw(st.sampled_from([0.0, 0.005, 0.04, 0.3, 0.5, 0.7, 1.0]))
    if draw(st.booleans()):
        after[changed] += random.choice(np.array([1, -1]), changed.sum()).astype(after.dtype)  # to a neighbor
    else:
        after[changed] = random.integers(0, 256, count * itemsize, dtype=np.uint8).view(after.dtype)[changed]
    return before, after.view(np.uint8), itemsize


@settings(deadline=None, max_examples=300)
@given(steps())
def test_a_slice_leads_to_the_child_and_back_bit_for_bit(step: tuple[Raw, Raw, int]) -> None:
    before, after, itemsize = step
    encoded = encode_slice(after, before, itemsize=itemsize, start=0, level=3)
    moved = before.copy()
    apply_slice(encoded, moved)
    assert moved.tobytes() == after.tobytes()
    if encoded.kind is SliceKind.DENSE:
        with pytest.raises(ValueError, match="only forwards"):
            apply_slice(encoded, moved, back=True)
    else:
        apply_slice(encoded, moved, back=True)
        assert moved.tobytes() == before.tobytes()


@settings(deadline=None)
@given(steps(), st.data())
def test_a_part_of_a_slice_moves_the_same_numbers(step: tuple[Raw, Raw, int], data: st.DataObject) -> None:
    before, after, itemsize = step
    count = len(before) // itemsize
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    part = slice(first * itemsize, last * itemsize)
    encoded = encode_slice(after, before, itemsize=itemsize, start=0, level=3)
    moved = before[part].copy()
    apply_slice(encoded, moved, within=(first, last))
    assert moved.tobytes() == after[part].tobytes()
    if encoded.kind is not SliceKind.DENSE:
        apply_slice(encoded, moved, within=(first, last), back=True)
        assert moved.tobytes() == before[part].tobytes()


@settings(deadline=None)
@given(steps())
def test_a_slice_without_a_parent_holds_every_number(step: tuple[Raw, Raw, int]) -> None:
    _, after, itemsize = step
    found = np.full(len(after), 77, dtype=np.uint8)
    apply_slice(encode_slice(after, None, itemsize=itemsize, start=0, level=3), found)
    assert found.tobytes() == after.tobytes()


def weights(count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def bf16(values: np.ndarray) -> Raw:
    """Rounded to nearest even, as torch does."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (0.0, SliceKind.SAME),
        (1e-6, SliceKind.SPARSE),
        (1e-5, SliceKind.SPARSE),
        (1e-3, SliceKind.CHANGE),
        (1.0, SliceKind.DENSE),
    ],
)
def test_the_kind_follows_the_share_of_change(step: float, kind: SliceKind) -> None:
    before = weights(20_000, 0)
    after = before + weights(20_000, 1) * np.float32(step * 50)
    encoded = encode_slice(bf16(after), bf16(before), itemsize=2, start=0, level=3)
    whole = encode_slice(bf16(after), None, itemsize=2, start=0, level=3)
    assert encoded.kind is kind or (step == 1.0 and encoded.kind is SliceKind.CHANGE and encoded.size < whole.size)
    assert encoded.size <= whole.size


def test_a_changed_bf16_weight_takes_at_most_1_6_bytes_between_half_a_percent_and_four() -> None:
    before = weights(1 << 20, 2)
    for step, low, high in ((1.07e-7, 0.0048, 0.0055), (1.2e-6, 0.035, 0.045)):
        after = before + weights(1 << 20, 3) * np.float32(step * 50)
        places = bf16(before).view(np.uint16) != bf16(after).view(np.uint16)
        encoded = encode_slice(bf16(after), bf16(before), itemsize=2, start=0, level=3)
        assert low < places.mean() < high
        assert encoded.size / places.sum() <= 1.6


SPARSE = encode_slice(
    np.array([1, 2, 3, 9, 5, 6, 7, 8], np.uint16).view(np.uint8),
    np.array([1, 2, 3, 4, 5, 6, 7, 8], np.uint16).view(np.uint8),
    itemsize=2,
    start=0,
    level=3,
)


def test_a_sparse_slice_names_the_places_and_the_differences() -> None:
    places, differences = sparse(SPARSE)
    assert (SPARSE.kind, places.tolist(), differences.tolist()) == (SliceKind.SPARSE, [3], [5])


def test_damaged_slices_are_refused_or_lead_elsewhere_without_a_crash() -> None:
    """A digest of the object and of the tensor finds what decodes differently."""
    whole = SPARSE.encoded()
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            target = np.arange(1, 9, dtype=np.uint16).view(np.uint8)
            try:
                for part in slices_in(memoryview(flipped), numbers=8, itemsize=2):
                    apply_slice(part, target)
            except ValueError:
                continue


@pytest.mark.parametrize("cut", range(len(SPARSE.encoded())))
def test_a_truncated_slice_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=r"truncated|slices end"):
        list(slices_in(memoryview(SPARSE.encoded()[:cut]), numbers=8, itemsize=2))


@pytest.mark.parametrize("kind", [SliceKind.SAME, SliceKind.SPARSE, SliceKind.CHANGE, SliceKind.DENSE])
def test_bytes_after_the_last_plane_are_refused(kind: SliceKind) -> None:
    body = SPARSE.body if kind is SliceKind.SPARSE else b"" if kind is SliceKind.SAME else bytes(8)
    with pytest.raises(ValueError, match="follow"):
        apply_slice(Slice(kind, 2, 0, 8, bytes(body) + b"x"), np.zeros(16, np.uint8))


@pytest.mark.parametrize("changed", [0, 9, 1 << 31])
def test_a_slice_that_changes_an_impossible_number_of_places_is_refused(changed: int) -> None:
    body = changed.to_bytes(4, "little") + bytes(SPARSE.body)[4:]
    with pytest.raises(ValueError, match="changes"):
        apply_slice(Slice(SliceKind.SPARSE, 2, 0, 8, body), np.zeros(16, np.uint8))


def test_slices_that_overlap_or_leave_a_gap_are_refused() -> None:
    one = SPARSE.encoded()
    for together, numbers in ((one + one, 16), (one, 16), (one, 4)):
        with pytest.raises(ValueError, match="slice"):
            list(slices_in(memoryview(together), numbers=numbers, itemsize=2))


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
@pytest.mark.parametrize("threads", [1, 3])
def test_an_object_of_many_slices_is_the_same_for_any_number_of_threads(
    dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 64)
    random, itemsize = np.random.default_rng(5), ITEMSIZE[dtype]
    shapes = {"a": (3, 40), "empty": (0, 4), "scalar": ()}
    old = {n: random.integers(0, 256, int(np.prod(s)) * itemsize, dtype=np.uint8) for n, s in shapes.items()}
    new = {name: raw.copy() for name, raw in old.items()}
    new["a"][:itemsize] ^= 1
    file = io.BytesIO()
    encoded = encode_version(
        [RawTensor(name, dtype, shape, new[name]) for name, shape in shapes.items()], old, file, level=3,
        threads=threads,
    )  # fmt: skip
    body = file.getvalue()
    assert encoded.size == len(body)
    assert encoded.kinds["same"] == len(ranges(120, itemsize))
    for entry in encoded.entries:
        region = memoryview(body)[entry.start : entry.start + entry.length]
        for part in slices_in(region, numbers=len(old[entry.name]) // itemsize, itemsize=itemsize):
            start = part.start * itemsize
            apply_slice(part, old[entry.name][start : start + part.count * itemsize])
        assert old[entry.name].tobytes() == new[entry.name].tobytes()
