"""Mutations of real records: of their bytes, fields, keys and headers. The seed repeats them exactly."""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.port import Outgoing

RAW = msgspec.msgpack.Decoder()
LONG = 100_000
"""Length of what is long without need: texts, ids, headers."""
MOST_BYTES = 1 << 19
"""Length of the longest body. A broker accepts no longer record than bus.max_record_bytes, 1 MiB by default."""
WEIRD: tuple[Callable[[random.Random], Any], ...] = (
    lambda _: None,
    lambda _: True,
    lambda r: r.choice((-1, 0, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))),
    lambda r: r.choice((float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -0.0, 1.5)),
    lambda r: r.choice(
        ("", "x", "\x00", "9" * 5_000, "g" + "9" * 5_000, "g000000/" + "9" * 5_000, "ä\u2028\U0010ffff")
    ),
    lambda _: "x" * LONG,
    lambda r: r.randbytes(r.choice((0, 1, 3, 4, 64))),
    lambda r: pack_int32([r.randrange(-(2**31), 2**31) for _ in range(8)]),
    lambda r: pack_float32([r.choice((0.0, -1.0, 1.0, float("nan"), float("-inf"), -3e38)) for _ in range(4)]),
    lambda _: [],
    lambda _: [[]] * 1_000,
    lambda _: {},
    lambda r: {str(i): i for i in range(r.choice((1, 1_000)))},
    lambda _: _nested(500),
)
"""Values that a field of any type may be replaced by."""


def mutated(record: Outgoing, other: Outgoing, rng: random.Random) -> Outgoing:
    """Return the record, mutated once or several times, or as it is. other: a record to take bytes and fields from."""
    for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 3))):
        record = rng.choice(MUTATIONS)(record, other, rng)
    return Outgoing(record.key, record.body[:MOST_BYTES], record.headers)


def _body(change: Callable[[bytes, bytes, random.Random], bytes]) -> Callable[..., Outgoing]:
    def mutate(record: Outgoing, other: Outgoing, rng: random.Random) -> Outgoing:
        return Outgoing(record.key, change(record.body, other.body, rng), record.headers)

    return mutate


def _flip_bits(body: bytes, _: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _truncate(body: bytes, _: bytes, rng: random.Random) -> bytes:
    return body[: rng.randrange(len(body) + 1)]


def _splice(body: bytes, other: bytes, rng: random.Random) -> bytes:
    return body[: rng.randrange(len(body) + 1)] + other[rng.randrange(len(other) + 1) :]


def _repeat(body: bytes, _: bytes, rng: random.Random) -> bytes:
    return body * rng.choice((2, 100))


def _random(_: bytes, __: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 16, 400)))


def _claim_more(body: bytes, _: bytes, rng: random.Random) -> bytes:
    """Announce 4,294,967,295 items, characters or bytes where the body has fewer."""
    at = rng.randrange(len(body) + 1)
    return body[:at] + rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")) + b"\xff\xff\xff\xff" + body[at:]


def _nest(body: bytes, _: bytes, rng: random.Random) -> bytes:
    """Nest arrays or maps at the beginning, or before the type, or at the end."""
    deep = rng.choice((b"\x91", b"\x81", b"\x81\xa1x")) * rng.choice((50, 1_000, 100_000))
    return rng.choice((deep + body, b"\x82\xa1x" + deep + b"\xc0" + body[1:], body[:-1] + deep))


def _fields(change: Callable[[dict[str, Any], Any, random.Random], Any]) -> Callable[..., Outgoing]:
    """A mutation of the decoded map; records that are no map any more stay as they are."""

    def mutate(body: bytes, other: bytes, rng: random.Random) -> bytes:
        try:
            fields, others = RAW.decode(body), RAW.decode(other)
        except Exception:  # mutated already
            return body
        if not isinstance(fields, dict) or not fields:
            return body
        change(fields, others, rng)
        return msgspec.msgpack.encode(fields)

    return _body(mutate)


def _replace_value(fields: dict[str, Any], _: Any, rng: random.Random) -> None:
    place: Any = fields
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            place[key] = rng.choice(WEIRD)(rng)
            return
        place = place[key]


def _remove(fields: dict[str, Any], _: Any, rng: random.Random) -> None:
    del fields[rng.choice(list(fields))]


def _add(fields: dict[str, Any], _: Any, rng: random.Random) -> None:
    fields[rng.choice(("surprise", "", "x" * LONG))] = rng.choice(WEIRD)(rng)


def _swap(fields: dict[str, Any], others: Any, rng: random.Random) -> None:
    if isinstance(others, dict) and others:
        name = rng.choice(list(others))
        fields[name] = others[name]


def _retype(fields: dict[str, Any], _: Any, rng: random.Random) -> None:
    kind = str(fields.get("type"))
    fields["type"] = rng.choice((kind.partition("/")[0] + "/9", kind.partition("/")[0], "", 1, None, kind * 1_000))


def _change_key(record: Outgoing, other: Outgoing, rng: random.Random) -> Outgoing:
    key = rng.choice(("", other.key, "x" * LONG, "g000000", "g" + "9" * 5_000))
    return Outgoing(key, record.body, record.headers)


def _change_headers(record: Outgoing, other: Outgoing, rng: random.Random) -> Outgoing:
    name = rng.choice(("trajectory", "replayed", "claim", "claim_lost", "body_omitted", "foreign", "", "x" * LONG))
    value = rng.choice(("", "x", "g000000/0", "../../etc/passwd", "c3" * 32, "9" * 5_000, "0/" + "9" * 30, "x" * LONG))
    body = b"" if name == "claim" and rng.random() < 0.8 else record.body
    return Outgoing(record.key, body, {**record.headers, name: value})


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


MUTATIONS: tuple[Callable[[Outgoing, Outgoing, random.Random], Outgoing], ...] = (
    *map(_body, (_flip_bits, _flip_bits, _truncate, _splice, _repeat, _random, _claim_more, _nest)),
    *[_fields(_replace_value)] * 6,
    *map(_fields, (_remove, _add, _swap, _retype)),
    _change_key,
    _change_headers,
)
