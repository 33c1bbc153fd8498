"""Checks that no interruption loses or repeats a score, by an independent record of every sampled token.

Every sampled token of a simulated run has a unique number. The checker records which worker sampled it, when and under
which version, which score records contain it, and the old log-prob that training used. It shares no code with the
code under test but the record types.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from blake3 import blake3

from palimpsest.common.bus.port import Record
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutReleased,
    CutRequested,
    DropReason,
    OldLogprobsComputed,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    decode,
)

KNOWN_S = 9.0
"""Seconds. The learner must count a worker that was never silent for this time, from before a cut to its answer."""
HOLD_LIMIT_S = 15.0
"""Seconds after which a simulated worker without messages from the learner ends its hold."""
NOTICED_S = 10.0
"""Seconds. Workers detect longer outages."""
MARGIN_S = 4.5
"""Seconds that a message may be in transit."""


class InvariantViolated(AssertionError):
    """A check failed."""


@dataclass(frozen=True)
class Token:
    """One sampled token."""

    by: str
    """Worker process: the worker's name and the number of its process."""
    version: int
    at: float


@dataclass(frozen=True)
class Reached:
    """A worker's answer to a cut, and the time when it was on the log."""

    by: str
    at: float
    message: CutReached


@dataclass
class ScoreChecker:
    """Record of a run, filled while it runs; `check` at the end."""

    problems: list[str] = field(default_factory=list)
    """Faults found during the run."""

    tokens: dict[int, Token] = field(default_factory=dict)
    control: list[tuple[float, CutRequested | CutReleased | VersionPublished]] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)
    released_holds: list[tuple[str, int, float]] = field(default_factory=list)
    """Worker process, the version it held, and the time when it ended the hold by itself."""
    announced: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Worker process -> times of its messages that name a version."""
    engines_died: int = 0
    """Number of engines that died while their worker ran."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each outage of the log."""
    sent: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """Trajectory -> all token arrays of its records."""
    sent_at: dict[int, float] = field(default_factory=dict)
    """Token -> time when the first record with it was on the log."""
    scored: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Token -> versions of the weights that scored it, once per durable record."""
    scored_by_replaced: set[int] = field(default_factory=set)
    """Tokens that a learner scored after its replacement; its successor may have scored them too."""
    counted: list[tuple[int, int]] = field(default_factory=list)
    """Versions, and the cut after which the weights of each changed."""
    cuts: dict[int, frozenset[str]] = field(default_factory=dict)
    """Version -> worker processes whose answers the learner had read at the cut after which its weights changed."""
    kept: dict[str, tuple[TrajectoryFinished, Mapping[int, float], int]] = field(default_factory=dict)
    """Trajectory -> its record, its old log-probs by token, and the learner's version at that time."""

    def sampled(self, token: int, by: str, version: int, *, at: float) -> None:
        """Record that an engine sampled this token."""
        self.tokens[token] = Token(by, version, at)

    def note(self, topic: str, records: Sequence[Record], by: str, *, at: float, replaced: bool = False) -> None:
        """Record published messages. `by`: the process; `replaced`: whether another learner has replaced it."""
        for message in (decode(topic, record.body) for record in records):
            match message:
                case SegmentFlushed() | TrajectoryFinished():
                    assert topic == TRAJECTORIES
                    self._sent(message, at)
                case TrajectoryDropped() if message.reason is DropReason.ENGINE_FAILED:
                    self.problems.append(f"{by} dropped {message.trajectory}: {message.detail}")
                case CutReached():
                    assert topic == WORKERS
                    self.reached.append(Reached(by, at, message))
                case WorkerAlive() | VersionApplied() if message.version >= 0:
                    self.announced[by].append(at)
                case OldLogprobsComputed():
                    assert topic == OLD_LOGPROBS
                    self._scored(message, replaced)
                case CutRequested() | CutReleased() | VersionPublished():
                    assert topic == CONTROL
                    self.control.append((at, message))

    def changed(self, version: int, cut: int, answered: Sequence[str], *, heard_by: float) -> None:
        """Record that the version's weights changed after this cut, with the workers whose answers had been read."""
        self.counted.append((version, cut))
        self.cuts[version] = frozenset(
            answer.by
            for answer in self.reached
            if answer.message.cut == cut and answer.message.worker in answered and answer.at <= heard_by
        )

    def keeps(self, record: TrajectoryFinished, old: Mapping[int, float], now: int) -> None:
        """Record a trajectory of the learner with its old log-probs by token; the last call counts."""
        self.kept[record.trajectory] = (record, old, now)

    def check(self) -> None:
        """Raises InvariantViolated if a check fails."""
        if self.problems:
            raise InvariantViolated(self.problems[0])
        self._check_no_sampling_after_an_answer()
        self._check_answers_in_time_were_used()
        self._check_no_early_release()
        for token, versions in self.scored.items():
            if versions != [self.tokens[token].version]:
                raise InvariantViolated(
                    f"token {token} of version {self.tokens[token].version} was scored by {versions}"
                )
        for record, old, now in self.kept.values():
            self._check_kept(record, old, now)

    def deaths(self) -> int:
        """Number of workers that sampled tokens both before a death and after the restart."""
        lives = {token.by for token in self.tokens.values()}
        return len(lives) - len({by.partition(".")[0] for by in lives})

    def unscored(self) -> int:
        """Number of tokens of kept trajectories that had no score when training needed it."""
        return sum(
            token not in old and self.tokens[token].version != now
            for record, old, now in self.kept.values()
            for token, _ in trainable(record)
        )

    def _check_kept(self, record: TrajectoryFinished, old: Mapping[int, float], now: int) -> None:
        for token, version in trainable(record):
            what = f"{record.trajectory}: token {token} of version {version}"
            times = len(self.scored.get(token, ()))
            if token in old:
                if old[token] != score_under(version):
                    raise InvariantViolated(f"{what} has the wrong value {old[token]}")
                if times != 1 and token not in self.scored_by_replaced:
                    raise InvariantViolated(f"{what} has a value, but {times} records")
            elif version != now and not self._is_late(token):
                raise InvariantViolated(f"{what} has no score at {now}, {times} records: {self.tokens[token]}")

    def _is_late(self, number: int) -> bool:
        """True if the token may lack a score.

        That is, the token was not on the log when the cut of its version was requested, and the learner did not read
        the worker's answer in time, or the worker had ended its hold before it sampled the token.
        """
        token = self.tokens[number]
        asked = {m.cut: at for at, m in self.control if isinstance(m, CutRequested)}
        if any(self.sent_at[number] < asked[cut] for version, cut in self.counted if version == token.version):
            return False
        if token.by not in self.cuts.get(token.version, frozenset()):
            return True
        return any(by == token.by and token.version <= held and at <= token.at for by, held, at in self.released_holds)

    def _check_no_sampling_after_an_answer(self) -> None:
        """After its answer a worker samples the cut's version only once released, and older versions never."""
        by_life = defaultdict(list)
        for number, token in self.tokens.items():
            by_life[token.by].append((number, token))
        for answer in self.reached:
            version, until = self._held(answer)
            for number, token in by_life[answer.by]:
                late = token.version < version or (token.version == version and token.at < until)
                if answer.at < token.at and late:
                    raise InvariantViolated(f"token {number} was sampled after {answer}: {token}, held until {until}")

    def _check_answers_in_time_were_used(self) -> None:
        """The learner used every answer within the deadline (without outages) of a worker that it must count."""
        asked = {m.cut: (at, m) for at, m in self.control if isinstance(m, CutRequested)}
        for version, cut in self.counted:
            at, request = asked[cut]
            for answer in self.reached:
                known = self._is_known(answer, at)
                in_time = self._well_s(at, answer.at) < request.deadline_s
                if answer.message.cut == cut and known and in_time and answer.by not in self.cuts[version]:
                    raise InvariantViolated(f"{answer} was in time for the cut at {at}, but was not used")

    def _is_known(self, answer: Reached, requested: float) -> bool:
        """Whether the learner must count the worker from the request of a cut until its answer: never silent for long.

        A worker that falls silent during a cut counts as dead, so the cut does not wait for its answer.
        """
        announced = self.announced[answer.by]
        before = max((at for at in announced if at < requested), default=-math.inf)
        times = [before, *(at for at in announced if requested <= at < answer.at), answer.at]
        silent = (self._well_s(since, until) >= KNOWN_S for since, until in pairwise(times))
        return requested - before < KNOWN_S and not any(silent)

    def _check_no_early_release(self) -> None:
        """A worker may end its hold only after HOLD_LIMIT_S without messages from the learner on a working log."""
        for by, held, until in self.released_holds:
            last = max(at for at, _ in self.control if at <= until - MARGIN_S)
            last = max([last, *(back for gone, back in self.outages if back <= until and back - gone > NOTICED_S)])
            if until - last < HOLD_LIMIT_S - MARGIN_S:
                raise InvariantViolated(f"{by} released version {held} at {until}; the last message was at {last}")

    def _well_s(self, start: float, stop: float) -> float:
        """Seconds between these times without an outage of the log."""
        gone = sum(max(0.0, min(stop, back) - max(start, out)) for out, back in self.outages)
        return stop - start - gone

    def _held(self, answer: Reached) -> tuple[int, float]:
        """Version that the worker held from its answer on, and the time when the hold ended."""
        versions = {m.cut: m.version for _, m in self.control if isinstance(m, CutRequested)}
        version = versions[answer.message.cut]
        until = [at for by, held, at in self.released_holds if (by, held) == (answer.by, version) and at >= answer.at]
        asked = False
        for at, message in self.control:
            match message:
                case CutRequested():
                    asked = asked or message.cut == answer.message.cut
                case CutReleased() if asked and versions[message.cut] == version:
                    until.append(at)
                case VersionPublished() if asked and message.version == version:
                    until.append(at)
        return version, min(until, default=float("inf"))

    def _sent(self, message: SegmentFlushed | TrajectoryFinished, at: float) -> None:
        tokens: list[int] = np.frombuffer(message.tokens, dtype="<i4").tolist()
        self.sent[message.trajectory].append(tokens)
        covered = dict(trainable(message))
        self.sent_at |= {token: at for token in covered if token not in self.sent_at}
        for token, version in covered.items():
            if self.tokens[token].version != version:
                self.problems.append(f"{message.trajectory}: {self.tokens[token]} is labeled version {version}")
        if missing := [token for token in tokens if token in self.tokens and token not in covered]:
            self.problems.append(f"{message.trajectory}: no segment covers the sampled tokens {missing}")

    def _scored(self, message: OldLogprobsComputed, replaced: bool) -> None:
        digests = (
            (tokens, blake3(np.array(tokens[: message.stop], dtype="<i4").tobytes()).hexdigest())
            for tokens in self.sent[message.trajectory]
        )
        tokens = next((tokens for tokens, digest in digests if digest == message.prefix), None)
        if tokens is None or len(tokens) < message.stop:
            self.problems.append(f"scores of tokens that no worker sent: {message}")
            return
        values = np.frombuffer(message.values, dtype="<f4")
        for token, value in zip(tokens[message.start : message.stop], values, strict=True):
            if value != score_under(message.version):
                self.problems.append(f"{message} was not computed by the weights of its version")
            if replaced:
                self.scored_by_replaced.add(token)
            else:
                self.scored[token].append(message.version)


def score_under(version: int) -> float:
    """Log-prob of any token under the simulated learner's weights of this version; exact in float32."""
    return -(version + 1) / 64


def trainable(record: SegmentFlushed | TrajectoryFinished) -> list[tuple[int, int]]:
    """Token and version of every token that a segment covers."""
    tokens = np.frombuffer(record.tokens, dtype="<i4")
    return [(int(tokens[i]), s.version) for s in record.segments for i in range(s.start, s.stop)]
