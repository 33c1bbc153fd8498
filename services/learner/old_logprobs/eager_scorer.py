"""Computes old log-probs early: scores the tokens of the resident version that have arrived so far.

This needs no copy of the model: the learner holds the weights of the version until its first optimizer step. The scores
go to the score store, and also to the log if they must outlive the process.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.arrays import Float32Array, Int32Array, unpack_int32
from palimpsest.common.branches import sequences
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.messages import OLD_LOGPROBS, OldLogprobsComputed, SegmentFlushed, TrajectoryFinished, encode
from palimpsest.common.routes import RouteShape, unpack_routes
from palimpsest.common.trajectory import token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore, old_logprobs_record

BY = "learner"
Score = Callable[[Sequence[PaddedBatch]], list[Float32Array]]
"""Log-prob of every token of each micro-batch under the resident weights, [rows, tokens] float32, nats."""
Place = tuple[int, int, int]
"""Partition and offset on `trajectories`, and the place of a token sequence in the record."""


class Sampled(Protocol):
    """A trajectory, finished or not, and its position on the log."""

    @property
    def record(self) -> TrajectoryFinished | SegmentFlushed:
        """Validated (ingest/validation.py)."""

    @property
    def partition(self) -> int:
        """Partition of topic `trajectories`."""

    @property
    def offset(self) -> int:
        """Offset in the partition."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """The unscored part of a trajectory."""

    tokens: bytes
    row: Row
    """Tokens up to the last unscored one. Only unscored tokens of the resident version are trainable in this row."""


def as_row(record: TrajectoryFinished | SegmentFlushed) -> Row:
    """Return a row with the record's tokens and versions, to look up its scores. All other values are 0."""
    tokens = unpack_int32(record.tokens)
    return _row(record, tokens, token_versions(record.segments, len(tokens)))


class EagerScorer:
    """Scores each token once: tokens with a value in `scores` are skipped.

    durable: the log that values are published on before a call returns. None: the values stay in this process.
    packed: whether `score` packs the rows of a micro-batch. at_once: number of micro-batches in one call of `score`.
    at_once: number of micro-batches in one call of `score`. routes: of the experts that the records carry, None: none.
    """

    def __init__(
        self,
        score: Score,
        scores: ScoreStore,
        *,
        run: str,
        micro_batch_tokens: int,
        packed: bool = False,
        at_once: int = 1,
        durable: Bus | None = None,
        routes: RouteShape | None = None,
    ) -> None:
        self._score, self._scores, self._run = score, scores, run
        self._micro_batch_tokens, self._packed = micro_batch_tokens, packed
        self._at_once, self._durable = at_once, durable
        self._routes = routes
        self._resident: tuple[Version, str] | None = None
        self._done: set[Place] = set()
        self._waiting: dict[Place, _Waiting] = {}

    def work(
        self, sampled: Iterable[Sampled], now: Version, digest: str, *, should_stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Score the tokens of the resident version `now` that have no value. Return the number of tokens scored.

        digest: of the resident weights. Returns when no token is left, or when `should_stop` returns True after a call
        of `score`.
        """
        self._update_waiting(sampled, now, digest)
        by_row = {waiting.row: place for place, waiting in self._waiting.items()}
        count = 0
        batches = micro_batches(list(by_row), max_tokens=self._micro_batch_tokens, packed=self._packed)
        for start in range(0, len(batches), self._at_once):
            chunk = batches[start : start + self._at_once]
            for rows, values in zip(chunk, self._score([pad(rows) for rows in chunk]), strict=True):
                count += self._store(rows, values, [self._waiting[by_row[row]].tokens for row in rows], now, digest)
                for row in rows:
                    self._done.add(by_row[row])
                    del self._waiting[by_row[row]]
            if should_stop():
                break
        return count

    def is_done(self, one: Sampled) -> bool:
        """Whether `work` has processed this record and left no token of the resident version in it unscored."""
        return all((one.partition, one.offset, place) in self._done for place in range(len(_parts(one.record))))

    def _update_waiting(self, sampled: Iterable[Sampled], now: Version, digest: str) -> None:
        """Add new trajectories to `_waiting`; remove trajectories that are not in `sampled`."""
        if self._resident != (now, digest):
            self._resident = (now, digest)
            self._done.clear()
            self._waiting.clear()
        records = {
            (one.partition, one.offset, place): part for one in sampled for place, part in enumerate(_parts(one.record))
        }
        self._done &= records.keys()
        for place in self._waiting.keys() - records.keys():
            del self._waiting[place]
        for place, record in records.items():
            if place in self._done or place in self._waiting:
                continue
            unscored = self._unscored_row(record, now, digest)
            if unscored is None:
                self._done.add(place)
            else:
                self._waiting[place] = _Waiting(record.tokens, unscored)

    def _unscored_row(self, record: TrajectoryFinished | SegmentFlushed, now: Version, digest: str) -> Row | None:
        """The unscored part of the record; None if every token of `now` has a value."""
        if all(segment.version != now for segment in record.segments):
            return None
        known = self._scores.attach(as_row(record), {now: digest})
        spans = [(start, stop) for start, stop, version in self._scores.missing(known) if version == now]
        if not spans:
            return None
        versions = np.full(spans[-1][1], UNTRAINABLE, dtype=np.int32)  # causal: later tokens are not needed
        for start, stop in spans:
            versions[start:stop] = now
        row = _row(record, known.tokens[: len(versions)], versions)
        if self._routes is None:
            return row
        return replace(row, routes=unpack_routes(record.segments, len(known.tokens), self._routes)[: len(versions)])

    def _store(
        self, rows: Sequence[Row], values: Float32Array, tokens: Sequence[bytes], now: Version, digest: str
    ) -> int:
        """Publish and store the values of tokens of `now`. Return the number of tokens stored.

        NaN values are left out and counted.
        """
        records: list[OldLogprobsComputed] = []
        for row, packed, scored in zip(rows, tokens, values, strict=True):
            resident = row.versions == now
            valid = resident & ~np.isnan(scored[: len(resident)])
            instruments.OLD_UNSCORABLE.inc(int(resident.sum() - valid.sum()))
            records += [
                old_logprobs_record(
                    run=self._run, trajectory=row.trajectory, by=BY, tokens=packed, start=start, stop=stop,
                    version=now, digest=digest, values=scored[start:stop],
                )
                for start, stop in _runs(valid)
            ]  # fmt: skip
        if self._durable is not None:
            self._durable.publish(OLD_LOGPROBS, [Outgoing(record.trajectory, encode(record)) for record in records])
        for record in records:
            self._scores.put(record)
        return sum(record.stop - record.start for record in records)


def _parts(record: TrajectoryFinished | SegmentFlushed) -> Sequence[TrajectoryFinished | SegmentFlushed]:
    return (record,) if isinstance(record, SegmentFlushed) else sequences(record)


def _row(record: TrajectoryFinished | SegmentFlushed, tokens: Int32Array, versions: Int32Array) -> Row:
    return Row(
        trajectory=record.trajectory,
        tokens=tokens,
        versions=versions,
        behavior=np.zeros(len(tokens), dtype=np.float32),
        temperature=record.temperature,
        advantage=0.0,
        reward=0.0,
        success=False,
    )


def _runs(chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Longest runs of True, as [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False]))))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
