"""Convert groups of trajectories into rows and split the rows into minibatches."""

import random
from collections.abc import Sequence

import numpy as np

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.branches import sequences
from palimpsest.common.messages import Ending, TrajectoryFinished
from palimpsest.common.routes import RouteShape, unpack_routes
from palimpsest.common.trajectory import behavior_logprobs, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.advantages import group_advantages
from palimpsest.services.learner.batch.batching import Row


def to_rows(
    records: Sequence[TrajectoryFinished],
    advantages: str,
    *,
    lowest: int,
    baseline: Sequence[TrajectoryFinished] = (),
    routes: RouteShape | None = None,
) -> list[Row]:
    """Return the rows of one group, with advantages. advantages: the value of learner.advantages.kind.

    A record has a row for each of its sequences, all with its advantage. Its reward counts once in the baseline.

    lowest: tokens of lower versions exceed the staleness bound and are untrainable. baseline: more trajectories of the
    group; only their rewards count. routes: of the experts that the records carry, None: none.
    """
    rows: list[Row] = []
    rewards = [record.reward for record in (*records, *baseline)]
    for record, advantage in zip(records, group_advantages(advantages, rewards)[: len(records)], strict=True):
        rows += [_row(sequence, advantage, lowest, routes) for sequence in sequences(record)]
    return rows


def regroup(rows: Sequence[Row], groups: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Return the rows in groups of the sizes of `groups`."""
    left = iter(rows)
    return [[next(left) for _ in group] for group in groups]


def _row(record: TrajectoryFinished, advantage: float, lowest: int, routes: RouteShape | None) -> Row:
    tokens = unpack_int32(record.tokens)
    versions = token_versions(record.segments, len(tokens))
    stale = versions < lowest
    return Row(
        trajectory=record.trajectory,
        tokens=tokens,
        versions=np.where(stale, np.int32(UNTRAINABLE), versions),
        behavior=np.where(stale, np.float32(0), behavior_logprobs(record.segments, len(tokens))),
        temperature=record.temperature,
        advantage=advantage,
        reward=record.reward,
        success=record.success,
        group=record.group,
        truncated=record.ending is Ending.TRUNCATED,
        routes=None if routes is None else unpack_routes(record.segments, len(tokens), routes),
    )


def split_minibatches(groups: Sequence[list[Row]], minibatches: int, *, seed: int, version: Version) -> list[list[Row]]:
    """Deal groups among minibatches and return the rows of each. seed and version determine the order."""
    order = list(range(len(groups)))
    random.Random(f"{seed}/{version}").shuffle(order)  # noqa: S311
    return [[row for place in order[i::minibatches] for row in groups[place]] for i in range(minibatches)]
