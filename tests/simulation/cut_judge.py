"""Whether an interruption lost or doubled a score: an independent account of every sampled token.

Every sampled token of a simulated run has a number of its own, so that each can be followed: who sampled it, when,
under which version; which record of scores it stands in; whether it was trained on, and with what. Nothing here is
taken from the code under test but the records themselves.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
"""A worker that has spoken so shortly before a cut is known of."""
HOLD_LIMIT_S = 15.0
"""The patience of simulated workers."""
NOTICED_S = 10.0
"""Outages that are longer are noticed by them."""
MARGIN_S = 4.5
"""What is said may be under way for so long."""


class Violated(AssertionError):
    """A promise was not kept."""


@dataclass(frozen=True)
class Token:
    """One sampled token."""

    by: str
    """Life of a worker: its name and which one of its processes."""
    version: int
    at: float


@dataclass(frozen=True)
class Reached:
    """A worker's answer to a cut, when it stood on the log."""

    by: str
    at: float
    message: CutReached


@dataclass
class Judge:
    """Told of everything while it happens; `verdict` at the end."""

    problems: list[str] = field(default_factory=list)
    """What was seen at once to be wrong."""

    tokens: dict[int, Token] = field(default_factory=dict)
    control: list[tuple[float, CutRequested | CutReleased | VersionPublished]] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)
    gave_up: list[tuple[str, int, float]] = field(default_factory=list)
    """Worker's life, the version it held, and when it would wait no longer."""
    spoke: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Worker's life -> when it said that it has a version."""
    engines_died: int = 0
    """Engines that died under their worker."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """From when until when the log did not answer."""
    sent: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """Trajectory -> all token arrays that were sent of it."""
    sent_at: dict[int, float] = field(default_factory=dict)
    """Token -> when a record that holds it stood on the log."""
    scored: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Token -> versions whose weights scored it, as often as a durable record says so."""
    scored_in_vain: set[int] = field(default_factory=set)
    """Tokens that a learner scored after it was replaced: its successor may have done so, too."""
    counted: list[tuple[int, int]] = field(default_factory=list)
    """Version, and the cut after which its weights changed."""
    cuts: dict[int, frozenset[str]] = field(default_factory=dict)
    """Version -> lives of workers that were heard at the cut after which its weights changed."""
    kept: dict[str, tuple[TrajectoryFinished, Mapping[int, float], int]] = field(default_factory=dict)
    """Trajectory -> its record, the old log-probs the learner found for it by token, and the version then resident."""

    def sampled(self, token: int, by: str, version: int, *, at: float) -> None:
        """An engine sampled this token."""
        self.tokens[token] = Token(by, version, at)

    def note(self, topic: str, records: Sequence[Record], by: str, *, at: float, replaced: bool = False) -> None:
        """These were published, by this life of a worker or a learner, which another one has replaced."""
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
                    self.spoke[by].append(at)
                case OldLogprobsComputed():
                    assert topic == OLD_LOGPROBS
                    self._scored(message, replaced)
                case CutRequested() | CutReleased() | VersionPublished():
                    assert topic == CONTROL
                    self.control.append((at, message))

    def changed(self, version: int, cut: int, answered: Sequence[str], *, heard_by: float) -> None:
        """The weights of this version are gone, after this cut; by then the learner had heard of these workers."""
        self.counted.append((version, cut))
        self.cuts[version] = frozenset(
            answer.by
            for answer in self.reached
            if answer.message.cut == cut and answer.message.worker in answered and answer.at <= heard_by
        )

    def keeps(self, record: TrajectoryFinished, old: Mapping[int, float], now: int) -> None:
        """The learner has this trajectory, with these old log-probs by token; the last word of it counts."""
        self.kept[record.trajectory] = (record, old, now)

    def verdict(self) -> None:
        """Raise Violated unless every promise was kept."""
        if self.problems:
            raise Violated(self.problems[0])
        self._nothing_behind_the_learners_back()
        self._nobody_was_left_out_who_was_in_time()
        self._nobody_gave_up_too_early()
        for token, versions in self.scored.items():
            if versions != [self.tokens[token].version]:
                raise Violated(f"token {token} of version {self.tokens[token].version} was scored by {versions}")
        for record, old, now in self.kept.values():
            self._is_whole(record, old, now)

    def deaths(self) -> int:
        """Workers that sampled something before they died and something when they were started again."""
        lives = {token.by for token in self.tokens.values()}
        return len(lives) - len({by.partition(".")[0] for by in lives})

    def unscored(self) -> int:
        """Tokens of trajectories that were kept, without a score when they were needed."""
        return sum(
            token not in old and self.tokens[token].version != now
            for record, old, now in self.kept.values()
            for token, _ in trainable(record)
        )

    def _is_whole(self, record: TrajectoryFinished, old: Mapping[int, float], now: int) -> None:
        for token, version in trainable(record):
            what = f"{record.trajectory}: token {token} of version {version}"
            times = len(self.scored.get(token, ()))
            if token in old:
                if old[token] != score_under(version):
                    raise Violated(f"{what} was given {old[token]}")
                if times != 1 and token not in self.scored_in_vain:
                    raise Violated(f"{what} has a value, and {times} records of it")
            elif version != now and not self._is_late(token):
                raise Violated(f"{what} has no score at {now}, {times} records of it: {self.tokens[token]}")

    def _is_late(self, number: int) -> bool:
        """Whether it was not on the log yet when its version's cut was asked for, and its worker was not heard in time,
        or had given the learner up before it was sampled."""
        token = self.tokens[number]
        asked = {m.cut: at for at, m in self.control if isinstance(m, CutRequested)}
        if any(self.sent_at[number] < asked[cut] for version, cut in self.counted if version == token.version):
            return False
        if token.by not in self.cuts.get(token.version, frozenset()):
            return True
        return any(by == token.by and token.version <= held and at <= token.at for by, held, at in self.gave_up)

    def _nothing_behind_the_learners_back(self) -> None:
        """After a worker's answer nothing of the cut's version before the log let it go on, and of older ones never."""
        by_life = defaultdict(list)
        for number, token in self.tokens.items():
            by_life[token.by].append((number, token))
        for answer in self.reached:
            version, until = self._held(answer)
            for number, token in by_life[answer.by]:
                late = token.version < version or (token.version == version and token.at < until)
                if answer.at < token.at and late:
                    raise Violated(f"token {number} was sampled behind {answer}: {token}, held until {until}")

    def _nobody_was_left_out_who_was_in_time(self) -> None:
        """A worker that the learner must have known of, and that had answered by the deadline, outages left aside."""
        asked = {m.cut: (at, m) for at, m in self.control if isinstance(m, CutRequested)}
        for version, cut in self.counted:
            at, request = asked[cut]
            for answer in self.reached:
                known = any(at - KNOWN_S < spoke < at for spoke in self.spoke[answer.by])
                in_time = self._well_s(at, answer.at) < request.deadline_s
                if answer.message.cut == cut and known and in_time and answer.by not in self.cuts[version]:
                    raise Violated(f"{answer} came in time for what was asked at {at}, and nobody waited")

    def _nobody_gave_up_too_early(self) -> None:
        """A worker may take the learner for gone only when a log that was well was silent for so long."""
        for by, held, until in self.gave_up:
            last = max(at for at, _ in self.control if at <= until - MARGIN_S)
            last = max([last, *(back for gone, back in self.outages if back <= until and back - gone > NOTICED_S)])
            if until - last < HOLD_LIMIT_S - MARGIN_S:
                raise Violated(f"{by} gave up version {held} at {until}, the learner could be heard until {last}")

    def _well_s(self, start: float, stop: float) -> float:
        """So long between these times the log was well; it answers again when an outage is over."""
        gone = sum(max(0.0, min(stop, back) - max(start, out)) for out, back in self.outages)
        return stop - start - gone

    def _held(self, answer: Reached) -> tuple[int, float]:
        """The version that the worker held from its answer on, and until when."""
        versions = {m.cut: m.version for _, m in self.control if isinstance(m, CutRequested)}
        version = versions[answer.message.cut]
        until = [at for by, held, at in self.gave_up if (by, held) == (answer.by, version) and at >= answer.at]
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
                self.problems.append(f"{message.trajectory}: {self.tokens[token]} is said to be of version {version}")
        if missing := [token for token in tokens if token in self.tokens and token not in covered]:
            self.problems.append(f"{message.trajectory}: tokens {missing} were sampled, and no segment covers them")

    def _scored(self, message: OldLogprobsComputed, in_vain: bool) -> None:
        digests = (
            (tokens, blake3(np.array(tokens[: message.stop], dtype="<i4").tobytes()).hexdigest())
            for tokens in self.sent[message.trajectory]
        )
        tokens = next((tokens for tokens, digest in digests if digest == message.prefix), None)
        if tokens is None or len(tokens) < message.stop:
            self.problems.append(f"scores of tokens that nobody sent: {message}")
            return
        values = np.frombuffer(message.values, dtype="<f4")
        for token, value in zip(tokens[message.start : message.stop], values, strict=True):
            if value != score_under(message.version):
                self.problems.append(f"{message} was not computed by the weights of its version")
            if in_vain:
                self.scored_in_vain.add(token)
            else:
                self.scored[token].append(message.version)


def score_under(version: int) -> float:
    """What the simulated learner's weights of this version give for any token; exact in float32."""
    return -(version + 1) / 64


def trainable(record: SegmentFlushed | TrajectoryFinished) -> list[tuple[int, int]]:
    """Token and version of all that its segments cover."""
    tokens = np.frombuffer(record.tokens, dtype="<i4")
    return [(int(tokens[i]), s.version) for s in record.segments for i in range(s.start, s.stop)]
