"""Train fixed rows under torchrun with a replicated and with a sharded policy, and save both results.

torchrun --standalone --nproc-per-node=2 -m tests.processes.shard_on_ranks MODEL UNTIED EXPERTS FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.arrays import Float32Array
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer, serve_scoring
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.results import StepResult, merge
from tests.learner_parts.models import train
from tests.learner_parts.routes import WithRoutes
from tests.processes.sharded_versions import canaries, continued, walked
from tests.processes.train_on_ranks import CASES as UNEVEN, NOW, some_rows
from tests.records.builders import a_learner

OPTIMIZER = OptimizerConfig(lr=1e-3, epsilon=1e-3, weight_decay=0.1, max_grad_norm=0.05)
"""epsilon is above the rounding of the gradients, so the step is a smooth function of them."""
ONE = "one micro-batch on each rank"
UNTIED = "one micro-batch, a model with an output head"
HYBRID = "one micro-batch, each rank a node of its own"
AGAIN = "one micro-batch, each layer computed again in the backward pass"
EXPERTS = "one micro-batch, a mixture with replayed experts, computed again in the backward pass"
OFFLOAD = "one micro-batch, the optimizer in the host's memory"
PACKED = "one micro-batch of packed rows, each layer computed again in the backward pass"
THREE = "three micro-batches on each rank"
CASES = {ONE: [some_rows("i", [20, 20])], THREE: [some_rows("j", [35, 35, 33, 33, 31, 31])], **UNEVEN}
CASES[OFFLOAD] = CASES[EXPERTS] = CASES[UNTIED] = CASES[HYBRID] = CASES[AGAIN] = CASES[ONE]
CASES[PACKED] = [some_rows("p", [20, 20, 9, 7])]
LEARNER = a_learner(micro_batch_tokens=40)


def main(tied: str, untied: str, experts: str, folder: Path) -> None:
    """Save one file per case and rank. tied, untied, experts: folders of models."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    mesh, nodes = (
        init_device_mesh("cpu", (ranks.size,)),
        init_device_mesh("cpu", (ranks.size, 1), mesh_dim_names=("replica", "shard")),
    )
    for case, minibatches in CASES.items():
        model = {UNTIED: untied, EXPERTS: experts}.get(case, tied)
        layout, attention = ("packed", "sdpa") if case == PACKED else ("padded", "eager")
        files = ModelFiles(model, attention, nodes if case == HYBRID else mesh, ranks.device, layout=layout)
        whole_model, offload = load_model(model, ranks.device, attention, layout=layout), case == OFFLOAD
        replicated = TrainablePolicy(whole_model, OPTIMIZER, offload=offload)
        sharded = ShardedPolicy(files.build(holds=torch.float32, trains=True, offload=offload), OPTIMIZER, ranks)
        if case in (AGAIN, EXPERTS, PACKED):
            checkpoint_activations(replicated.model)
            sharded.model(checkpoint_activations)
        rows = [row for minibatch in minibatches for row in minibatch]
        calls = {name: passes_of(policy.model) for name, policy in (("replicated", replicated), ("sharded", sharded))}
        saved = {
            name: {"scores": scores(policy.model, rows, ranks), "own": own_scores(policy.model, rows, ranks)}
            | results(policy, minibatches, ranks)
            | {"calls": len(calls[name])}
            for name, policy in {"replicated": replicated, "sharded": sharded}.items()
        }
        torch.save(saved, folder / f"{case} {ranks.rank}.pt")
    files = ModelFiles(tied, "eager", mesh, ranks.device)
    torch.save(walked(files, ranks, folder / "objects"), folder / f"versions {ranks.rank}.pt")
    model = load_model(tied, ranks.device, "eager")
    torch.save(canaries(files, ranks, model, CASES[THREE][0]), folder / f"canaries {ranks.rank}.pt")
    torch.save(continued(files, ranks, folder / "checkpoint"), folder / f"checkpoint {ranks.rank}.pt")
    ranks.close()


def passes_of(model: torch.nn.Module) -> list[int]:
    """Return a list that grows with each forward pass of the first MLP."""
    calls: list[int] = []
    mlp = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # a repeated forward pass may end inside the MLP
    return calls


def results(policy: TrainablePolicy, minibatches: list[list[Row]], ranks: ProcessGroup) -> dict[str, Any]:
    """Results of one version. Tensors are whole."""
    gradients: list[list[torch.Tensor]] = []
    step = policy.step

    def noted(**_: float) -> float:
        gradients.append([gradient.clone() for gradient in whole(policy, "grad")])
        return step()

    policy.step = noted  # type: ignore[method-assign]
    own = train(policy, WithRoutes(policy.model), ranks, minibatches, NOW, config=LEARNER)
    together: StepResult = merge(ranks.gather_shares(own))
    return {
        "gradients": gradients,
        "masters": whole(policy, "data"),
        "loss": together.loss,
        "grad_norm": together.grad_norm,
        "trained": sorted(row.trajectory for scored in together.micro_batches for row in scored.batch.rows),
        "current": {
            row.trajectory: scored.current[i] for scored in own.micro_batches for i, row in enumerate(scored.batch.rows)
        },
        "bytes": sum(master.numel() * 4 for master in policy.masters),
    }


def whole(policy: TrainablePolicy, part: str) -> list[torch.Tensor]:
    """Masters ("data") or gradients ("grad") of all ranks."""
    if isinstance(policy, ShardedPolicy):
        return [getattr(parameter, part).full_tensor().detach().clone() for parameter in policy.parameters]
    return [getattr(master, part).clone() for master in policy.masters]


def scores(model: torch.nn.Module, rows: list[Row], ranks: ProcessGroup) -> list[torch.Tensor]:
    """Scores of all micro-batches, on rank 0: one micro-batch, then the others."""
    forward = model_scorer(model, ranks.device)
    if not ranks.is_rank0:
        assert serve_scoring(ranks, forward) == "enough"
        return []
    batches = [pad(batch) for batch in micro_batches(rows, max_tokens=40)]
    together = DistributedScorer(ranks, forward)
    values: list[Float32Array] = [*together(batches[:1]), *together(batches[1:])]
    ranks.broadcast_object(("enough",))
    return [torch.from_numpy(each) for each in values]


def own_scores(model: torch.nn.Module, rows: list[Row], ranks: ProcessGroup) -> list[torch.Tensor]:
    """Scores of this rank's rows by BatchScores; the first share has more passes than the others."""
    share: list[PaddedBatch] = [pad([row]) for row in rows[ranks.share :: ranks.shares][: 3 - 2 * ranks.share]]
    batch_scores = BatchScores(share, ranks.device, max_tokens=1, fresh=0, ranks=ranks)
    batch_scores.score(model, batch_scores.of(NOW))
    return batch_scores.values


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
