"""Builders of small, valid records and configurations."""

import numpy as np

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.objective import DiscrepancyConfig
from palimpsest.common.messages import Ending, Sampling, TrajectoryFinished, group_id, trajectory_id
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import Row

UNCORRECTED = DiscrepancyConfig(band="off", weight="off")
"""No mask and no weight."""
SAMPLING = Sampling(temperature=1.0, max_turn_tokens=8, max_trajectory_tokens=64, max_turns=4)


def a_segment(start: int, stop: int, version: int, logprob: float = -0.5) -> Segment:
    """Segment [start, stop) of this version, with the same log-prob for every token."""
    return Segment(start, stop, Version(version), pack_float32([logprob] * (stop - start)))


def a_finished(
    index: int,
    sample: int,
    *,
    segments: tuple[Segment, ...] = (),
    tokens: int = 8,
    reward: float = 0.5,
    run: str = "test",
) -> TrajectoryFinished:
    """A trajectory of `tokens` tokens; without segments, tokens [2, 6) have version 0."""
    return TrajectoryFinished(
        run=run,
        trajectory=trajectory_id(group_id(index), sample),
        group=group_id(index),
        attempt=0,
        worker="worker-0",
        environment="lookup",
        environment_version="1",
        tokens=pack_int32(list(range(1, tokens + 1))),
        segments=segments or (a_segment(2, 6, 0),),
        temperature=1.0,
        reward=reward,
        reward_parts={},
        success=reward == 1.0,
        ending=Ending.TERMINATED,
        turns=1,
    )


def a_row(
    name: str,
    tokens: list[int],
    versions: list[int],
    *,
    behavior: list[float] | None = None,
    advantage: float = 1.0,
    reward: float = 0.0,
    temperature: float = 1.0,
) -> Row:
    """A row. A negative versions[t] makes token t untrainable."""
    return Row(
        trajectory=name,
        tokens=np.array(tokens, dtype=np.int32),
        versions=np.array([v if v >= 0 else UNTRAINABLE for v in versions], dtype=np.int32),
        behavior=np.array(behavior or [-1.0] * len(tokens), dtype=np.float32),
        temperature=temperature,
        advantage=advantage,
        reward=reward,
        success=False,
    )


def a_learner(*, micro_batch_tokens: int = 10_000, **sections: object) -> LearnerConfig:
    """A learner configuration with these sections."""
    return LearnerConfig.model_validate({"versions": 1, "micro_batch_tokens": micro_batch_tokens, **sections})
