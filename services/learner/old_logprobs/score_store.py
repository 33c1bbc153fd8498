"""Old log-probs that came over the log, or were computed early, until their trajectory is trained on.

A value belongs to a token under a version's weights and behind a prefix, so it is kept under all of these: the
trajectory's id, the span, the version, the digest of its weights, and the digest of the tokens up to the span's end.
What does not agree in every one of them is not taken for a token's old log-prob.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from blake3 import blake3

from palimpsest.common.arrays import Float32Array, Int32Array, pack_float32, pack_int32, unpack_float32
from palimpsest.common.messages import OldLogprobsComputed
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import Row

Missing = tuple[int, int, Version]
"""Tokens [start, stop), sampled by this version, whose old log-probs are not known."""
ROUNDING = 1e-3
"""A log-prob may be so much above 0, in nats: rounding in the log-softmax."""


@dataclass(frozen=True, slots=True)
class _Key:
    start: int
    stop: int
    version: Version
    digest: str
    prefix: str


class ScoreStore:
    """What is known so far, by trajectory."""

    def __init__(self) -> None:
        self._known: dict[str, dict[_Key, Float32Array]] = {}
        self.digests: dict[Version, str] = {}
        """Version -> digest of the weights published under it. Every route keeps its digests here."""
        self.repeats = 0
        """Values that came again, bit for bit: delivery is at least once."""
        self.conflicts = 0
        """Values that came again and differed; the first ones stand."""
        self.largest_conflict = 0.0
        """Largest difference among those, in nats: 1e-3 is what another padding does to bf16, more is an error."""

    def __len__(self) -> int:
        """Trajectories of which anything is known."""
        return len(self._known)

    def put(self, computed: OldLogprobsComputed) -> None:
        """Keep computed log-probs; a repeated record changes nothing. Raises MalformedTrajectory."""
        check_computed(computed)
        key = _Key(computed.start, computed.stop, computed.version, computed.digest, computed.prefix)
        values = unpack_float32(computed.values)
        known = self._known.setdefault(computed.trajectory, {})
        first = known.setdefault(key, values)
        if first is values:
            return
        if np.array_equal(first, values):
            self.repeats += 1
            return
        self.conflicts += 1
        other = first != values  # equal infinities have no difference
        self.largest_conflict = max(self.largest_conflict, float(np.abs(first[other] - values[other]).max()))

    def attach(self, row: Row, digests: Mapping[Version, str] | None = None) -> Row:
        """The row with `old` filled wherever version, weights and prefix agree. What it has already stays.

        digests: version -> digest of its weights, `self.digests` by default. Tokens of other versions get nothing.
        """
        digests = self.digests if digests is None else digests
        known = self._known.get(row.trajectory)
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
            wanted = (row.versions[span] == key.version) & np.isnan(old[span])
            old[span] = np.where(wanted, values, old[span])
        return replace(row, old=old)

    def missing(self, row: Row) -> list[Missing]:
        """Runs of trainable tokens of one version whose `old` is not known, in order. Attach first."""
        if row.old is None:
            return spans(row.versions)
        return spans(np.where(np.isnan(row.old), row.versions, np.int32(UNTRAINABLE)))

    def forget(self, trajectory: str) -> None:
        """The trajectory is resolved; unknown ones are passed over."""
        self._known.pop(trajectory, None)

    def retain(self, wanted: Callable[[str], bool]) -> None:
        """Forget every trajectory that is not wanted any more."""
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
    """blake3 (hex) of tokens [0, stop). tokens: int32 bytes as they travel."""
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
    """The record for the log. tokens: int32 bytes of the trajectory (whatever stands behind `stop` does not count);
    values: nats, one for each token [start, stop)."""
    if len(values) != stop - start:
        raise ValueError(f"{len(values)} values for tokens [{start}, {stop})")
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
    """The records that tell the values [tokens] of a row's tokens of this version, one for each run of them."""
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
    """Raise MalformedTrajectory unless the record agrees with itself.

    A value of -inf is one (the token's probability underflowed); a NaN is none.
    """
    where = f"{computed.trajectory} [{computed.start}, {computed.stop}) of version {computed.version}"
    if computed.version < 0:
        raise MalformedTrajectory(RejectCause.NEGATIVE_VERSION, f"{where}: versions start at 0")
    if not 0 < computed.start < computed.stop:
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH, f"{where}: no span of tokens that something could predict"
        )
    if len(computed.values) != 4 * (computed.stop - computed.start):
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH,
            f"{where}: {computed.stop - computed.start} tokens but {len(computed.values)} bytes of log-probs "
            f"(4 a token are due)",
        )
    values = unpack_float32(computed.values)
    if np.isnan(values).any():
        raise MalformedTrajectory(RejectCause.NOT_FINITE, f"{where}: an old log-prob is no number")
    if (values > ROUNDING).any():
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, f"{where}: an old log-prob is above 0")
