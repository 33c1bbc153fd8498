"""Which tokens get old log-probs, over random runs with cuts, restarts, and failing workers (algorithms.md 18.6)."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from palimpsest.common.arrays import pack_int32, unpack_float32
from palimpsest.common.messages import CutRequested, SegmentFlushed, TrajectoryFinished, group_id, trajectory_id
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.eager_scorer import as_row
from tests.learner_parts.interruption import RUN, Learner, Log, Table, Ticking, a_flush, alive, digest, reached
from tests.records.builders import a_finished, a_segment

pytestmark = pytest.mark.thorough

VERSIONS = 4
GROUPS, SAMPLES = 3, 2
Token = tuple[str, tuple[int, ...]]
"""Trajectory id and its tokens up to and including this one; a second sampling of the id has other tokens."""


class SampledTrajectory:
    """A trajectory as its worker holds it."""

    def __init__(self, index: int, sample: int, draw: random.Random) -> None:
        self.index, self.sample, self.name = index, sample, trajectory_id(group_id(index), sample)
        self.worker, self.done = draw.choice("ab"), False
        self._draw = draw
        self.begin()

    def begin(self) -> None:
        """Start sampling, for the first or a second time."""
        self.tokens, self.versions, self.flushed_to = [1, 2, 3], [-1, -1, -1], 0

    def grow(self, version: int) -> None:
        """Append a tool's answer or nothing, then some tokens of this version."""
        tool, own = self._draw.randrange(3), self._draw.randrange(1, 6)
        self.tokens += [self._draw.randrange(4, 30_000) for _ in range(tool + own)]
        self.versions += [-1] * tool + [version] * own

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments of one version each."""
        edges = [0, *(np.flatnonzero(np.diff(self.versions)) + 1).tolist(), len(self.versions)]
        runs = [(a, b, self.versions[a]) for a, b in pairwise(edges)]
        return tuple(a_segment(a, b, v) for a, b, v in runs if v >= 0)

    def flush(self, cut: int) -> SegmentFlushed:
        """Return the flush of all tokens so far."""
        self.flushed_to = len(self.tokens)
        return a_flush(self.index, self.sample, cut=cut, tokens=self.tokens, segments=self.segments, worker=self.worker)

    def finish(self) -> TrajectoryFinished:
        """Return the finished trajectory."""
        self.done = True
        whole = a_finished(self.index, self.sample, segments=self.segments)
        return msgspec.structs.replace(whole, tokens=pack_int32(self.tokens))


class RandomRun:
    """Workers that sample over some versions; all healthy workers answer each cut."""

    def __init__(self, folder: Path, seed: int, *, failing: float) -> None:
        self.draw, self.failing = random.Random(seed), failing
        self.log, self.table = Log(folder), Table(0)
        self.log.announced(0)
        self.log.answers = [self.answer]
        self.lives = [SampledTrajectory(i, s, self.draw) for i in range(GROUPS) for s in range(SAMPLES)]
        self.ends: list[TrajectoryFinished] = []
        self.given_up: set[Token] = set()
        """Sampled tokens of first samplings that a second one replaced."""
        self.positions: dict[int, int] = {}
        self.learner = self.a_learner(None)

    def a_learner(self, before: Learner | None) -> Learner:
        return Learner(
            self.log, self.table, before=before, clock=Ticking(0.3), groups=GROUPS,
            micro_batch_tokens=self.draw.choice([1, 30, 1000]),
        )  # fmt: skip

    def publish(self, *records: TrajectoryFinished | SegmentFlushed) -> None:
        for partition, offset in self.log.sampled(*records).items():
            self.positions[partition] = max(offset, self.positions.get(partition, 0))

    def answer(self, _: Log, request: CutRequested) -> None:
        for worker in "ab":
            if self.draw.random() < self.failing:
                continue
            mine = [life for life in self.lives if life.worker == worker and not life.done]
            flushes = [life.flush(request.cut) for life in mine if life.flushed_to < len(life.tokens)]
            self.publish(
                *flushes, *(flush for flush in flushes if self.draw.random() < 0.2)
            )  # delivery is at least once
            self.log.report(reached(worker, request.cut, dict(self.positions), request.version))

    def sample(self, version: int) -> None:
        """Apply random events in random order."""
        for _ in range(12):
            life = self.draw.choice(self.lives)
            match self.draw.randrange(12):
                case 0 | 1 | 2 | 3 | 4 | 5 if not life.done:
                    life.grow(version)
                case 6 if not life.done and len(life.tokens) > 3:
                    self.end(life)
                case 7 if not life.done:
                    self.given_up |= tokens_of(life.name, life.tokens, life.versions)
                    life.begin()
                case 8 | 9:
                    self.learner.read(version)
                    self.learner.interruption.work(Version(version), digest(version))
                case 10:
                    self.restart()

    def restart(self) -> None:
        self.learner.close()
        self.learner = self.a_learner(self.learner)

    def end(self, life: SampledTrajectory) -> None:
        self.ends.append(life.finish())
        self.publish(self.ends[-1])

    def run(self) -> None:
        """Run all versions and finish every live trajectory in the last one."""
        for version in range(VERSIONS):
            self.table.version = version
            self.log.report(*(alive(worker, version) for worker in "ab"))
            self.sample(version)
            if version == VERSIONS - 1:
                for life in self.lives:
                    if not life.done:
                        life.grow(version)
                        self.end(life)
            self.learner.interruption.cut(Version(version), digest(version))
            if self.draw.random() < 0.3:
                self.restart()  # a restart between scoring and the step repeats the cut
                self.learner.interruption.cut(Version(version), digest(version))
            self.log.announced(version + 1)
            self.learner.interruption.published(Version(version + 1), digest(version + 1))

    def scored(self) -> Counter[Token]:
        """Count the scores of each token on the log; checks that each value comes from its version's weights."""
        samplings = {(end.trajectory, end.tokens) for end in self.ends} | {
            (f.trajectory, f.tokens) for f in self.log.messages("trajectories") if isinstance(f, SegmentFlushed)
        }
        prefixes: dict[tuple[str, str], list[int]] = {}
        for name, packed in samplings:
            for stop in range(4, len(packed) + 1, 4):
                prefixes[name, blake3(packed[:stop]).hexdigest()] = np.frombuffer(packed[:stop], "<i4").tolist()
        counts: Counter[Token] = Counter()
        for record in self.log.scored():
            tokens = prefixes[record.trajectory, record.prefix]
            assert len(tokens) == record.stop
            assert record.run == RUN
            assert record.digest == digest(record.version)
            exact = Table(record.version).value(tokens[record.start :])
            assert unpack_float32(record.values).tolist() == exact.tolist()
            counts.update((record.trajectory, tuple(tokens[: t + 1])) for t in range(record.start, record.stop))
        return counts


def tokens_of(name: str, tokens: list[int], versions: list[int]) -> set[Token]:
    """The sampled tokens of a trajectory."""
    return {(name, tuple(tokens[: t + 1])) for t, version in enumerate(versions) if version >= 0}


@pytest.mark.parametrize("seed", range(12))
def test_18_6_every_token_is_scored_once_by_its_own_version(tmp_path: Path, seed: int) -> None:
    run = RandomRun(tmp_path, seed, failing=0.0)
    run.run()
    wanted: set[Token] = set()
    for life in run.lives:
        wanted |= tokens_of(life.name, life.tokens, life.versions)
    counts = run.scored()
    assert wanted
    assert set(counts.values()) == {1}
    assert wanted <= counts.keys() <= wanted | run.given_up
    digests = {Version(v): digest(v) for v in range(VERSIONS)}
    for end in run.ends:
        row = run.learner.scores.attach(as_row(end), digests)
        assert run.learner.scores.missing(row) == []
    assert run.learner.scores.conflicts == 0
    assert len(run.learner.reader.flushed) == 0


@pytest.mark.parametrize("seed", range(12))
def test_18_6_with_failing_workers_tokens_stay_unscored_and_none_is_scored_by_another_version(
    tmp_path: Path, seed: int
) -> None:
    """`scored` checks every value against its version's weights."""
    run = RandomRun(tmp_path, seed, failing=0.5)
    run.run()
    wanted: set[Token] = set()
    for life in run.lives:
        wanted |= tokens_of(life.name, life.tokens, life.versions)
    counts = run.scored()
    assert set(counts.values()) == {1}
    assert counts.keys() <= wanted | run.given_up
    for end in run.ends:
        row = run.learner.scores.attach(as_row(end), {Version(v): digest(v) for v in range(VERSIONS)})
        missing = {t for start, stop, _ in run.learner.scores.missing(row) for t in range(start, stop)}
        for t in np.flatnonzero(row.versions >= 0):
            assert (int(t) in missing) == ((end.trajectory, tuple(row.tokens[: t + 1].tolist())) not in counts)
            if int(t) not in missing:
                assert row.old is not None
                assert float(row.old[t]) == float(Table(int(row.versions[t])).value([row.tokens[t]])[0])
