"""Manifests: the identity of a version, and detection of damage."""

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots.manifest import (
    ITEMSIZE,
    SCHEMA,
    Canary,
    Damaged,
    Manifest,
    Parent,
    StoredObject,
    TensorEntry,
    parts_digest,
    seal,
    unseal,
    version_digest,
)
from palimpsest.common.versions import Version

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
ENTRIES = st.builds(
    TensorEntry,
    name=st.text(min_size=1, max_size=12),
    dtype=st.sampled_from(sorted(ITEMSIZE)),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    digest=HEX,
    start=st.integers(0, 1 << 40),
    length=st.integers(1, 1 << 40),
)
LISTS = st.lists(ENTRIES, max_size=5, unique_by=lambda entry: entry.name)
A = TensorEntry("a", "bfloat16", (2, 3), blake3(b"a").hexdigest(), 0, 20)
B = TensorEntry("b", "float32", (), blake3(b"b").hexdigest(), 20, 13)


def a_manifest(*entries: TensorEntry, version: int = 3, **fields: object) -> Manifest:
    whole: dict[str, object] = {
        "schema": SCHEMA,
        "run": "first",
        "writer": 2,
        "version": Version(version),
        "digest": version_digest(entries),
        "encoding": "base",
        "object": blake3(b"object").hexdigest(),
        "object_size": 33,
        "tensors": entries,
        "canaries": (Canary((1, 2, 3), (1, 2), (-0.5, -1.25), (-0.5, -1.5)), Canary((4, 5), (1,), (-2.0,), ())),
    }
    return Manifest(**{**whole, **fields})  # type: ignore[arg-type]


@settings(deadline=None)
@given(LISTS, st.integers(0, 1 << 31), st.text(max_size=8))
def test_a_sealed_manifest_reads_back_equal(entries: list[TensorEntry], version: int, run: str) -> None:
    manifest = a_manifest(*entries, version=version, run=run)
    assert unseal(seal(manifest)) == manifest


def test_any_flipped_byte_of_a_sealed_manifest_is_detected() -> None:
    body = seal(a_manifest(A))
    for place in range(len(body)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            damaged = body[:place] + bytes([body[place] ^ mask]) + body[place + 1 :]
            with pytest.raises(Damaged):
                unseal(damaged)


def test_a_manifest_truncated_anywhere_is_refused() -> None:
    body = seal(a_manifest(A))
    for length in range(len(body)):
        with pytest.raises(Damaged):
            unseal(body[:length])


def test_without_the_seal_a_changed_size_would_be_accepted() -> None:
    """The seal is the only check that detects a changed object_size."""
    text = msgspec.json.encode(a_manifest(A)).replace(b'"object_size":33', b'"object_size":34')
    resealed = b'{"seal":"' + blake3(text).hexdigest().encode() + b'","manifest":' + text + b"}"
    assert unseal(resealed).object_size == 34
    kept = seal(a_manifest(A)).replace(b'"object_size":33', b'"object_size":34')
    with pytest.raises(Damaged, match="contradicts its seal"):
        unseal(kept)


def test_a_manifest_with_a_digest_of_other_tensors_is_refused() -> None:
    with pytest.raises(Damaged, match="version 3: its digest is different from the digest of its tensors"):
        unseal(seal(a_manifest(A, digest=version_digest([B]))))


def test_a_later_schema_is_refused_with_the_release_to_use() -> None:
    with pytest.raises(
        Damaged, match=r"manifest schema 4 is unknown; this release reads schemas 1 to 3: use the release that wrote it"
    ):
        unseal(seal(a_manifest(A, schema=4)))
    text = msgspec.json.encode({**msgspec.to_builtins(a_manifest(A, schema=4)), "surprise": 1})
    with pytest.raises(Damaged, match="manifest schema 4 is unknown"):
        unseal(b'{"seal":"' + blake3(text).hexdigest().encode() + b'","manifest":' + text + b"}")


def test_a_manifest_of_schema_1_is_read() -> None:
    """As earlier releases wrote it: without the fields of schema 2."""
    fields = msgspec.to_builtins(a_manifest(A, schema=1))
    del fields["parent"], fields["encodings"]
    text = msgspec.json.encode(fields)
    sealed = b'{"seal":"' + blake3(text).hexdigest().encode() + b'","manifest":' + text + b"}"
    assert unseal(sealed) == a_manifest(A, schema=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 1, "encoding": "delta"}, "unknown in schema 1"),
        ({"encoding": "unheard"}, "encoding unheard is unknown"),
        ({"encoding": "delta"}, "with parent None"),
        ({"encoding": "slices", "parent": Parent(Version(2), "")}, "encoding slices with parent"),
        ({"encoding": "delta", "parent": Parent(Version(3), "")}, "its parent 3 is not an earlier version"),
    ],
)
def test_fields_about_the_encoding_that_contradict_each_other_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(Damaged, match=message):
        unseal(seal(a_manifest(A, **fields)))  # type: ignore[arg-type]


PARTS = (StoredObject("a" * 64, 20), StoredObject("b" * 64, 13))


def in_parts(*parts: StoredObject, **fields: object) -> Manifest:
    return a_manifest(A, B, **{"schema": 3, "parts": parts, "object": parts_digest(parts), **fields})  # type: ignore[arg-type]


def test_a_version_in_parts_reads_back_equal_and_names_its_objects() -> None:
    manifest = in_parts(*PARTS)
    assert unseal(seal(manifest)) == manifest
    assert manifest.objects == PARTS
    assert a_manifest(A).objects == (StoredObject(blake3(b"object").hexdigest(), 33),)


def test_a_version_in_one_object_is_written_as_before() -> None:
    """Earlier releases read it: no field and no schema is new."""
    assert b'"parts"' not in seal(a_manifest(A))
    assert b'"schema":2' in seal(a_manifest(A))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (a_manifest(A, schema=3), "schema 3 without parts"),
        (in_parts(*PARTS, schema=2), "schema 2 with parts"),
        (in_parts(StoredObject("a" * 64, 33)), "fewer than two"),
        (in_parts(StoredObject("a" * 64, 33), StoredObject("b" * 64, 0)), "one of them is empty"),
        (in_parts(*PARTS, object_size=34), "the sizes of its parts are not 34 bytes in sum"),
        (in_parts(*PARTS, object=parts_digest(PARTS[::-1])), "its object is different from the digest of its parts"),
    ],
)
def test_parts_that_contradict_the_other_fields_are_refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(Damaged, match=message):
        unseal(seal(manifest))


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'{"seal":"","manifest":{},"more":1}', b"\xff\xfe"])
def test_a_body_that_is_no_manifest_is_refused(body: bytes) -> None:
    with pytest.raises(Damaged):
        unseal(body)


def test_an_unknown_field_is_refused() -> None:
    text = msgspec.json.encode({**msgspec.to_builtins(a_manifest(A)), "surprise": 1})
    with pytest.raises(Damaged, match="surprise"):
        unseal(b'{"seal":"' + blake3(text).hexdigest().encode() + b'","manifest":' + text + b"}")


@settings(deadline=None)
@given(LISTS, st.randoms(use_true_random=False))
def test_a_version_digest_does_not_depend_on_the_order_of_tensors(entries: list[TensorEntry], random: object) -> None:
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert version_digest(shuffled) == version_digest(entries)


def test_a_version_digest_is_blake3_over_name_type_shape_and_digest_of_each_tensor() -> None:
    text = f'["a","bfloat16",[2,3],"{A.digest}"]["b","float32",[],"{B.digest}"]'
    assert version_digest([B, A]) == blake3(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        TensorEntry("a2", A.dtype, A.shape, A.digest, A.start, A.length),
        TensorEntry(A.name, "float16", A.shape, A.digest, A.start, A.length),
        TensorEntry(A.name, A.dtype, (3, 2), A.digest, A.start, A.length),
        TensorEntry(A.name, A.dtype, A.shape, blake3(b"other").hexdigest(), A.start, A.length),
    ],
)
def test_a_version_digest_changes_with_every_property_of_a_tensor(changed: TensorEntry) -> None:
    assert version_digest([changed, B]) != version_digest([A, B])


def test_a_version_digest_changes_when_a_tensor_is_missing() -> None:
    assert len({version_digest(entries) for entries in ([A, B], [A], [B], [])}) == 4


def test_a_version_digest_stays_when_only_the_encoding_differs() -> None:
    elsewhere = TensorEntry(A.name, A.dtype, A.shape, A.digest, start=500, length=7)
    assert version_digest([elsewhere, B]) == version_digest([A, B])


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("bfloat16", (2, 3), 12), ("float32", (), 4), ("int64", (0, 5), 0), ("bool", (7,), 7)]
)
def test_a_tensors_size_follows_from_its_type_and_shape(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert TensorEntry("t", dtype, shape, "", 0, 0).size == size
