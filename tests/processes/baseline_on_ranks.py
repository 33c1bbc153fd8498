"""Train with VCPO's minimum-variance baseline on sharded ranks, and on one rank alone; save both results.

torchrun --standalone --nproc-per-node=2 -m tests.processes.baseline_on_ranks MODEL FOLDER
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.policy import load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.results import merge
from tests.learner_parts.adapters import LORA, renew
from tests.learner_parts.models import CPU, CurrentModel, train
from tests.processes.context_beside import on_shards
from tests.processes.context_on_ranks import one_rank
from tests.processes.critic_on_ranks import full, noting
from tests.processes.failing_rows_on_ranks import BLOCK, ONLY, spoil
from tests.processes.shard_on_ranks import OPTIMIZER
from tests.processes.train_on_ranks import NOW, some_rows
from tests.records.builders import a_learner, a_row

FULL, HYBRID, ADAPTED, FAILING, SHARED, LOCAL = (
    "full",
    "hybrid, each rank a node of its own",
    "an adapter",
    "a row that fails",
    "ranks that share rows",
    "norms of the own shards only",
)
CASES = (FULL, HYBRID, ADAPTED, FAILING, SHARED, LOCAL)


def grouped(rows: list[Row], rewards: list[float], groups: str) -> list[Row]:
    """The rows with these rewards. groups: a letter for each row."""
    return [replace(row, reward=reward, group=group) for row, reward, group in zip(rows, rewards, groups, strict=True)]


BAD = a_row("bad", [5, 9, ONLY, 8, 11], [-1, -1, NOW, NOW, NOW])
MINIBATCHES = [
    grouped([*some_rows("v", [20, 33, 9, 7, 14, 26]), BAD], [1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0], "aabbbab"),
    grouped(some_rows("w", [12, 30, 31]), [0.0, 1.0, 0.25], "ddd"),
]


def learner(case: str) -> LearnerConfig:
    adapted = case == ADAPTED
    return a_learner(
        vcpo={"baseline": True, "lr_scaling": "sqrt"},
        loss={"objective": "policy_gradient"},
        proximal={"kind": "bypass"},
        discrepancy={"band": "off"},
        lora={"rank": LORA.rank, "alpha": LORA.alpha, "targets": LORA.targets} if adapted else {},
        optimizer=OPTIMIZER.model_dump(),
        micro_batch_tokens=40,
        layout="packed",
    )


def trained(case: str, policy: Any, ranks: ProcessGroup) -> dict[str, Any]:
    """Results of one version. Tensors are whole."""
    gradients: list[list[torch.Tensor]] = []
    norms: list[float] = []
    policy.step = noting(policy, gradients, norms)
    if case == FAILING:
        causal = getattr(policy.model, "causal", policy.model)
        spoil(SimpleNamespace(model=SimpleNamespace(causal=causal)), BLOCK)  # type: ignore[arg-type]
    own = train(policy, CurrentModel(policy.model), ranks, MINIBATCHES, NOW, config=learner(case))
    together = merge(ranks.gather_shares(own))
    return {
        "gradients": gradients,
        "norms": norms,
        "masters": [full(each) for each in getattr(policy, "parameters", policy.masters)],
        "baseline": own.baseline,
        "factor": own.lr_factor,
        "rejected": dict(together.rejected),
        "advantages": {
            row.trajectory: float(scored.advantages[i].max())
            for scored in together.micro_batches
            for i, row in enumerate(scored.batch.rows)
        },
    }


def replicated(case: str, model: str) -> TrainablePolicy:
    """The policy of a rank that has the whole model."""
    whole = load_model(model, CPU, "sdpa", layout="packed")
    if case == ADAPTED:
        add_adapter(whole, learner(case).lora)
        renew(whole, seed=7)
    return TrainablePolicy(whole, OPTIMIZER)


def sharded(case: str, model: str, ranks: ProcessGroup) -> Any:
    """The policy of ranks that split it."""
    shape, names = ((ranks.size, 1), ("replica", "shard")) if case == HYBRID else ((ranks.size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return on_shards(learner(case), model, mesh, ranks)[0]


def main(model: str, folder: Path) -> None:
    """Save one file per case and rank."""
    torch.set_num_threads(1)
    ranks, alone = ProcessGroup(equal_passes=True), one_rank()
    for case in CASES:
        if case == SHARED:
            ranks.share_rows(ranks.size)
        saved = {"alone": trained(case, replicated(case, model), alone)}
        own_norms = patch.object(ShardedPolicy, "squared_norm", TrainablePolicy.squared_norm)
        with own_norms if case == LOCAL else nullcontext():
            saved["sharded"] = trained(case, sharded(case, model, ranks), ranks)
        if case == SHARED:
            ranks.share_rows(1)
        torch.save(saved, folder / f"{case} {ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
