"""Trajectories as workers publish them, with random tokens."""

import numpy as np

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import Ending, TrajectoryFinished, encode, trajectory_id
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version

TURNS = 4
VOCABULARY = 150_000
POOL = 1 << 18


class Maker:
    """Makes trajectories quickly: tokens and log-probs are slices of a random pool."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._tokens = self._random.integers(0, VOCABULARY, POOL, dtype=np.int32).astype("<i4").tobytes()
        self._logprobs = (-self._random.exponential(0.5, POOL)).astype("<f4").tobytes()

    def finished(
        self, group: str, sample: int, *, tokens: int, run: str = "bench", worker: str = "w", version: int = 0
    ) -> TrajectoryFinished:
        """Return a trajectory of `tokens` tokens (at least 8). The second half of each turn is sampled."""
        turn = tokens // TURNS
        segments = tuple(
            Segment(start, start + turn - turn // 2, Version(version), self._cut(self._logprobs, turn - turn // 2))
            for start in range(turn // 2, turn * TURNS, turn)
        )
        success = bool(self._random.integers(2))
        return TrajectoryFinished(
            run=run,
            trajectory=trajectory_id(group, sample),
            group=group,
            attempt=0,
            worker=worker,
            environment="lookup",
            environment_version="1",
            tokens=self._cut(self._tokens, tokens),
            segments=segments,
            temperature=1.0,
            reward=float(success),
            reward_parts={"answer": float(success)},
            success=success,
            ending=Ending.TERMINATED,
            turns=TURNS,
        )

    def outgoing(self, record: TrajectoryFinished) -> Outgoing:
        """Return the record as the outbox of a worker publishes it."""
        return Outgoing(record.group, encode(record), {"trajectory": record.trajectory})

    def _cut(self, pool: bytes, values: int) -> bytes:
        at = 4 * int(self._random.integers(POOL - values))
        return pool[at : at + 4 * values]
