"""Old log-probs that were read from the log or computed early, kept until their trajectory is trained on.

The log-prob of a token depends on the weights and on the tokens before it. The key of a value has five fields: the
trajectory's id, the span, the version, the digest of its weights, and the digest of the tokens up to the span's end. A
value applies to a token only if all five fields match. The branches of a trajectory share its values: where their
tokens differ, so do the digests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from blake3 import blake3

from palimpsest.common.arrays import Float32Array, Int32Array, pack_float32, pack_int32, unpack_float32
from palimpsest.common.branches import trajectory_of
from palimpsest.common.messages import OldLogprobsComputed
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import Row

Missing = tuple[int, int, Version]
"""Tokens [start, stop) without an old log-prob, and the version that sampled them."""
ROUNDING = 1e-3
"""Tolerance for log-probs above 0, in nats: the log-softmax rounds."""


@dataclass(frozen=True, slots=True)
class _Key:
    start: int
    stop: int
    version: Version
    digest: str
    prefix: str


class ScoreStore:
    """Old log-probs received so far, keyed by trajectory."""

    def __init__(self) -> None:
        self._known: dict[str, dict[_Key, Float32Array]] = {}
        self.digests: dict[Version, str] = {}
        """Version -> digest of the weights published under it. Every route keeps its digests here."""
        self.repeats = 0
        """Number of records received again with the same bits: delivery is at least once."""
        self.conflicts = 0
        """Number of records received again with other values; the first values are kept."""
        self.largest_conflict = 0.0
        """Largest difference between conflicting values, nats. Padding changes bf16 by about 1e-3; more is an error."""

    def __len__(self) -> int:
        """Number of trajectories with values."""
        return len(self._known)

    def put(self, computed: OldLogprobsComputed) -> None:
        """Store computed log-probs. A repeated record changes nothing. Raises MalformedTrajectory."""
        check_computed(computed)
        key = _Key(computed.start, computed.stop, computed.version, computed.digest, computed.prefix)
        values = unpack_float32(computed.values)
        known = self._known.setdefault(trajectory_of(computed.trajectory), {})
        first = known.setdefault(key, values)
        if first is values:
            return
        if np.array_equal(first, values):
            self.repeats += 1
            return
        self.conflicts += 1
        differs = first != values  # excludes equal infinities, whose difference is NaN
        self.largest_conflict = max(self.largest_conflict, float(np.abs(first[differs] - values[differs]).max()))

    def attach(self, row: Row, digests: Mapping[Version, str] | None = None) -> Row:
        """Return the row with `old` filled where version, weights and prefix match. Existing values are kept.

        digests: version -> digest of its published weights; `self.digests` by default. Tokens of versions without a
        digest get no value.
        """
        digests = self.digests if digests is None else digests
        known = self._known.get(trajectory_of(row.trajectory))
        if not known:
            return row
        old = np.full(len(row.tokens), np.nan, dtype=np.float32) if row.old is None else row.old.copy()
        tokens = pack_int32(row.tokens)
        prefixes: dict[int, str] = {}
        for key, values in known.items():
            if key.stop > len(row.tokens) or digests.get(key.version) != key.digest:
                continue
            if key.stop not in prefixes:
                prefixes[key.stop] = prefix_digest(tokens, key.stop)
            if prefixes[key.stop] != key.prefix:
                continue
            span = slice(key.start, key.stop)
            empty = (row.versions[span] == key.version) & np.isnan(old[span])
            old[span] = np.where(empty, values, old[span])
        return replace(row, old=old)

    def missing(self, row: Row) -> list[Missing]:
        """Runs of trainable tokens of one version without an old log-prob, in order. Call `attach` first."""
        if row.old is None:
            return spans(row.versions)
        return spans(np.where(np.isnan(row.old), row.versions, np.int32(UNTRAINABLE)))

    def forget(self, trajectory: str) -> None:
        """Remove the values of a resolved trajectory. Unknown trajectories are ignored."""
        self._known.pop(trajectory, None)

    def retain(self, wanted: Callable[[str], bool]) -> None:
        """Remove the values of every trajectory for which `wanted` returns False."""
        self._known = {trajectory: known for trajectory, known in self._known.items() if wanted(trajectory)}


def spans(versions: Int32Array) -> list[Missing]:
    """Longest runs of tokens of one version, in order.

    >>> spans(np.array([-1, 3, 3, 4, -1, 4], dtype=np.int32))
    [(1, 3, 3), (3, 4, 4), (5, 6, 4)]
    """
    edges = (np.flatnonzero(np.diff(versions)) + 1).tolist()
    return [
        (start, stop, Version(int(versions[start])))
        for start, stop in pairwise([0, *edges, len(versions)])
        if stop > start and versions[start] != UNTRAINABLE
    ]


def prefix_digest(tokens: bytes, stop: int) -> str:
    """blake3 (hex) of tokens [0, stop). tokens: packed int32, as in messages."""
    return blake3(tokens[: 4 * stop]).hexdigest()


def old_logprobs_record(
    *,
    run: str,
    trajectory: str,
    by: str,
    tokens: bytes,
    start: int,
    stop: int,
    version: Version,
    digest: str,
    values: Float32Array,
) -> OldLogprobsComputed:
    """Return the record for the log.

    tokens: packed int32 tokens of the trajectory (tokens after `stop` are ignored); values: nats, one for each token in
    [start, stop). Raises ValueError if the number of values differs from the number of tokens.
    """
    if len(values) != stop - start:
        raise ValueError(f"{len(values)} values for the {stop - start} tokens [{start}, {stop})")
    return OldLogprobsComputed(
        run=run,
        trajectory=trajectory,
        by=by,
        version=version,
        digest=digest,
        start=start,
        stop=stop,
        prefix=prefix_digest(tokens, stop),
        values=pack_float32(values),
    )


def computed_of(
    row: Row, values: Float32Array, *, run: str, by: str, version: Version, digest: str
) -> list[OldLogprobsComputed]:
    """Return one record for each run of the row's tokens of this version. values: [tokens], nats."""
    tokens = pack_int32(row.tokens)
    return [
        old_logprobs_record(
            run=run,
            trajectory=row.trajectory,
            by=by,
            tokens=tokens,
            start=start,
            stop=stop,
            version=version,
            digest=digest,
            values=values[start:stop],
        )
        for start, stop, of in spans(row.versions)
        if of == version
    ]


def check_computed(computed: OldLogprobsComputed) -> None:
    """Raise MalformedTrajectory unless the record is consistent.

    A value of -inf is valid (the token's probability underflowed). NaN is not valid.
    """
    where = f"{computed.trajectory} [{computed.start}, {computed.stop}) of version {computed.version}"
    if computed.version < 0:
        raise MalformedTrajectory(RejectCause.NEGATIVE_VERSION, f"{where}: versions start at 0")
    if not 0 < computed.start < computed.stop:
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH, f"{where}: not a span of predicted tokens (0 < start < stop)"
        )
    if len(computed.values) != 4 * (computed.stop - computed.start):
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH,
            f"{where}: {computed.stop - computed.start} tokens but {len(computed.values)} bytes of log-probs "
            f"(4 bytes a token are required)",
        )
    values = unpack_float32(computed.values)
    if np.isnan(values).any():
        raise MalformedTrajectory(RejectCause.NOT_FINITE, f"{where}: an old log-prob is NaN")
    if (values > ROUNDING).any():
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, f"{where}: an old log-prob is above 0")
