"""Train on four ranks, sharded over all and over two nodes of two, and continue from their checkpoints on two.

torchrun --standalone --nproc-per-node=4 -m tests.processes.four_on_ranks train MODEL FOLDER
torchrun --standalone --nproc-per-node=2 -m tests.processes.four_on_ranks continue MODEL FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from palimpsest.services.learner.batch.batching import Row, micro_batches, pad, partition_by_rank
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.shard_files import write_shards
from palimpsest.services.learner.sharding.sharded_model import whole
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy, like
from tests.processes.averages_on_ranks import KINDS, averaged, built, results as averages_of
from tests.processes.context_beside import BESIDE, trained
from tests.processes.shard_on_ranks import OPTIMIZER, results, scores
from tests.processes.sharded_versions import Versions, a_rank
from tests.processes.train_on_ranks import NOW, some_rows

FULL, HYBRID = "full", "hybrid, two nodes of two"
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    FULL: ((4,), ("shard",)),
    HYBRID: ((2, 2), ("replica", "shard")),
}
"""Shape of the mesh, and the names of its dimensions."""
MINIBATCHES = [some_rows("k", [31, 6, 9, 17, 23, 40]), some_rows("l", [12, 35])]
"""Some ranks have two rows of the first one; two ranks have none of the second one."""
ROWS = [row for minibatch in MINIBATCHES for row in minibatch]


def train_on_four(model: str, folder: Path) -> None:
    """Save two files per mesh and rank, and a checkpoint of each mesh."""
    ranks = ProcessGroup(equal_passes=True)
    for name, (shape, dimensions) in MESHES.items():
        files = ModelFiles(model, "eager", init_device_mesh("cpu", shape, mesh_dim_names=dimensions), ranks.device)
        sharded = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
        plain = load_model(model, ranks.device, "eager")
        saved: dict[str, Any] = {
            "scores": scores(sharded.model, ROWS, ranks),
            "alone": alone(plain, ROWS),
            "own scores": own_scores(sharded.model, ranks, ranks),
            "own alone": own_scores(plain, ranks, None),
            "sharded": results(sharded, MINIBATCHES, ranks),
            "replicated": results(TrainablePolicy(plain, OPTIMIZER), MINIBATCHES, ranks),
        }
        checkpoint = folder / name
        saved["files"] = write_shards(a_rank(sharded, files, ranks), checkpoint)
        saved |= {"steps": sharded.steps, "state": state(sharded), "scores after": scores(sharded.model, ROWS, ranks)}
        torch.save(saved, folder / f"{name} {ranks.rank}.pt")
        torch.save(beside_the_policy(model, shape, dimensions, ranks), folder / f"{name}, beside {ranks.rank}.pt")
    ranks.close()


def beside_the_policy(
    model: str, shape: tuple[int, ...], dimensions: tuple[str, ...], ranks: ProcessGroup
) -> dict[str, dict[str, Any]]:
    """Case -> results with whole models on four ranks and with shards: of critics and adapters, and of averages."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=dimensions)
    saved = {
        case: {"replicated": trained(case, model, None, ranks), "sharded": trained(case, model, mesh, ranks)}
        for case in BESIDE
    }
    with torch.no_grad():
        return saved | {kind: averages(kind, model, mesh, ranks) for kind in KINDS}


def averages(kind: str, model: str, mesh: DeviceMesh, ranks: ProcessGroup) -> dict[str, Any]:
    """Three versions averaged by whole models and by shards."""
    files = ModelFiles(model, "eager", mesh, ranks.device)
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    shards, store = a_rank(policy, files, ranks), Versions()
    state_of_training = built(kind, policy, store, ranks, shards)
    replicated = averaged(kind, model, policy, state_of_training, shards, store)
    source: Any = state_of_training.source
    means = [like(*both).full_tensor() for both in zip(policy.parameters, source.average.means, strict=True)]
    return {"replicated": replicated, "sharded": averages_of(state_of_training, policy, means)}


def continue_on_two(model: str, folder: Path) -> None:
    """Save one file per mesh of the checkpoint and rank."""
    ranks = ProcessGroup(equal_passes=True)
    files = ModelFiles(model, "eager", init_device_mesh("cpu", (ranks.size,)), ranks.device)
    for name in MESHES:
        policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
        if ranks.is_rank0:
            steps = torch.load(folder / f"{name} 0.pt", weights_only=False)["steps"]
            policy.source = folder / name
            policy.restore({}, steps)
        policy.share(ranks)
        saved = {"steps": policy.steps, "state": state(policy), "scores after": scores(policy.model, ROWS, ranks)}
        torch.save(saved, folder / f"{name}, continued {ranks.rank}.pt")
    ranks.close()


def alone(model: torch.nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    """Scores of the micro-batches of `scores`, by this process."""
    forward = model_scorer(model, torch.device("cpu"))
    return [torch.from_numpy(forward(pad(batch))) for batch in micro_batches(rows, max_tokens=40)]


def own_scores(model: torch.nn.Module, share: ProcessGroup, ranks: ProcessGroup | None) -> list[torch.Tensor]:
    """Old log-probs of this rank's rows of the first minibatch; the ranks have unequal numbers of passes."""
    rows = partition_by_rank(MINIBATCHES[0], share.shares)[share.share]
    batch_scores = BatchScores([pad([row]) for row in rows], share.device, max_tokens=1, fresh=0, ranks=ranks)
    batch_scores.score(model, batch_scores.of(NOW))
    return batch_scores.values


def state(policy: ShardedPolicy) -> dict[str, torch.Tensor]:
    """Masters and moments of all ranks."""
    return {name: whole(tensor) for name, tensor in policy.shards().items()}  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train_on_four, "continue": continue_on_two}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
