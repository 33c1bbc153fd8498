"""The discrepancy of each worker, made from a real training step."""

from pathlib import Path

import msgspec
import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.version_record import Batch, version_record
from palimpsest.services.learner.proximal.types import Exact, Proximal
from tests.learner_parts.models import load, train
from tests.records.builders import a_finished, a_learner, a_row

VERSION = Version(4)


class OffsetProximal:
    """A proximal that is 0.1 nats above the behavior log-probs in even samples, and 0.3 in odd ones."""

    def proximal(self, batches: list[PaddedBatch], now: Version, fresh: int = 0) -> Proximal:
        offsets = [torch.tensor([0.3 if int(row.trajectory[-1]) % 2 else 0.1 for row in b.rows]) for b in batches]
        return Exact([torch.from_numpy(b.behavior) + o[:, None] for b, o in zip(batches, offsets, strict=True)])


def test_the_discrepancy_of_each_worker_is_that_of_its_own_tokens(starting_model: Path) -> None:
    """Even samples come from worker-0, odd ones from worker-1; sample i has i + 2 tokens that the model sampled."""
    records = [msgspec.structs.replace(a_finished(0, i), worker=f"worker-{i % 2}") for i in range(4)]
    rows = [
        a_row(record.trajectory, list(range(5, 9 + i)), [-1, *[4] * (i + 2), -1], advantage=(-1.0) ** i)
        for i, record in enumerate(records)
    ]
    policy = TrainablePolicy(load(starting_model), OptimizerConfig(lr=1e-3))
    done = train(policy, OffsetProximal(), ProcessGroup(), [rows[:2], rows[2:]], VERSION, config=a_learner())
    line = version_record(
        Batch(VERSION, Version(VERSION + 1), records, [rows]), done, seconds=1.0, phases={}, learning_rate=1e-3,
        counts={}, sampled_tokens=0,
    )  # fmt: skip
    assert list(line["by_worker"]) == ["worker-0", "worker-1"]
    for worker, tokens, discrepancy in (("worker-0", 2 + 4, 0.1), ("worker-1", 3 + 5, 0.3)):
        assert line["by_worker"][worker]["tokens"] == tokens
        assert line["by_worker"][worker]["log_discrepancy_abs"] == pytest.approx(discrepancy, rel=1e-3)
