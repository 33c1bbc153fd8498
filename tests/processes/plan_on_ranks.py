"""Train a version with a sharded policy, and save what each rank holds, by the causes of `palimpsest plan`.

torchrun --standalone --nproc-per-node=2 -m tests.processes.plan_on_ranks MODEL FOLDER
"""

import sys
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.sharded_model import local_values
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.measured import MeasuredTrainer, new_bytes
from tests.records.builders import UNCORRECTED, a_learner, a_row

LENGTH, GROUPS, SAMPLES = 120, 2, 3
NOW = Version(1)
LEARNER = a_learner(
    discrepancy=UNCORRECTED, micro_batch_tokens=2 * LENGTH, groups_per_batch=GROUPS, sharding="full",
    loss={"kl": {"weight": 0.1}},
)  # fmt: skip


class OldVersion:
    """A shadow that has the starting weights as every version. It needs no store."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.version: Version | None = None

    def load_version(self, version: Version) -> bool:
        """Keep the weights."""
        self.version = version
        return True

    def expect(self, version: Version) -> None:
        """Prepare nothing."""


def main(model: str, folder: Path) -> None:
    """Save one file per rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    files = ModelFiles(model, "sdpa", init_device_mesh("cpu", (ranks.size,)), ranks.device)
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), LEARNER.optimizer, ranks)
    start = files.build(holds=COMPUTES, trains=False)
    shadow, store = OldVersion(files.build(holds=COMPUTES, trains=False)), cast("SnapshotClient", None)
    source = SnapshotSource(
        policy.model, store, ranks.device, max_tokens=LEARNER.micro_batch_tokens, loaded=lambda _: None, ranks=ranks,
        shadow=lambda: shadow,
    )  # fmt: skip
    trainer = MeasuredTrainer(policy, TrainingState(source, start=start), ranks, LEARNER, length=LENGTH, seed=0)
    rows = [
        a_row(f"r{i}", [3 + (i + t) % 200 for t in range(LENGTH)], [i % 2] * LENGTH, advantage=(-1.0) ** i)
        for i in range(GROUPS * SAMPLES)
    ]
    trainer.train([rows], NOW)
    moments = [each for state in policy.optimizer.state.values() for each in (state["exp_avg"], state["exp_avg_sq"])]
    held = {
        "masters, float32": new_bytes(policy.masters, set()),
        "gradients, float32": new_bytes(policy.gradients(), set()),
        "moments of AdamW, float32": new_bytes(moments, set()),
        "weights of an old version": _of_model(shadow.model),
        "weights of version 0": _of_model(start),
    }
    torch.save(held | trainer.held, folder / f"held {ranks.rank}.pt")
    ranks.close()


def _of_model(model: torch.nn.Module) -> int:
    return new_bytes([*map(local_values, model.parameters()), *model.buffers()], set())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
