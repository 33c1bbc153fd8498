"""A worker with scripted trajectories, in a thread: its records depend only on the learner's progress.

Group g is trained at version g // groups, because it arrives when that version is published. The first half of each of
its trajectories has the largest allowed staleness, the second half staleness 1. So no trajectory is dropped as stale,
and staleness and ledger are known in advance.
"""

import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    TRAJECTORIES,
    Ending,
    GroupOffered,
    RunFinished,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
    trajectory_id,
)
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version

PROMPT, HALF = 12, 6
"""Tokens of a prompt, and of each half of the sampled tokens."""
VOCABULARY = range(3, 250)
POLL_S = 0.05


@dataclass
class ScriptedWorker:
    """Worker thread; the context manager starts and ends it."""

    config: RunConfig
    published: list[TrajectoryFinished] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="scripted worker")

    def __enter__(self) -> "ScriptedWorker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        open_groups: list[GroupOffered] = []
        newest = -1
        with closing(open_bus(self.config)) as bus, ExitStack() as stack:
            tasks = stack.enter_context(bus.consumer(TASKS))
            control = stack.enter_context(bus.consumer(CONTROL))
            while not self._over.is_set():
                open_groups += [decode(TASKS, record.body) for record in tasks.poll(limit=100, timeout_s=POLL_S)]
                for record in control.poll(limit=100, timeout_s=0):
                    message = decode(CONTROL, record.body)
                    if isinstance(message, RunFinished):
                        return
                    if isinstance(message, VersionPublished):
                        newest = max(newest, message.version)
                open_groups = [group for group in open_groups if not self._answered(bus, group, newest)]

    def _answered(self, bus: Bus, group: GroupOffered, newest: int) -> bool:
        """Publish the group's trajectories if their version is published. Returns whether it did."""
        number = int(group.group[1:])
        now = number // self.config.learner.groups_per_batch
        if newest < now:
            return False
        oldest = max(0, now - self.config.learner.max_staleness)
        for sample in range(self.config.tasks.samples_per_group):
            trajectory = self._trajectory(group, number, sample, oldest, max(0, now - 1))
            self.published.append(trajectory)
            bus.publish(TRAJECTORIES, [Outgoing(group.group, encode(trajectory))])
        return True

    def _trajectory(
        self, group: GroupOffered, number: int, sample: int, oldest: int, newest: int
    ) -> TrajectoryFinished:
        rng = np.random.default_rng((number, sample))
        tokens = rng.integers(VOCABULARY.start, VOCABULARY.stop, PROMPT + 2 * HALF)
        # random log-probs: surrogates need no real ones
        halves = rng.uniform(-6.0, -4.0, (2, HALF)).astype(np.float32)
        cut = PROMPT + HALF
        segments = (
            Segment(PROMPT, cut, Version(oldest), pack_float32(halves[0])),
            Segment(cut, cut + HALF, Version(newest), pack_float32(halves[1])),
        )
        return TrajectoryFinished(
            run=self.config.run.id,
            trajectory=trajectory_id(group.group, sample),
            group=group.group,
            attempt=0,
            worker="worker-0",
            environment=group.environment,
            environment_version="1",
            tokens=pack_int32(tokens),
            segments=segments,
            temperature=1.0,
            reward=float(sample % 2),
            reward_parts={},
            success=sample % 2 == 1,
            ending=Ending.TERMINATED,
            turns=1,
        )
