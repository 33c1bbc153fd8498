"""Train one version on fixed rows under torchrun, with any number of ranks, and save the results.

torchrun --standalone --nproc-per-node=2 -m tests.processes.train_on_ranks MODEL FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch

from palimpsest.common.arrays import Float32Array
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.objective import LossConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer, serve_scoring
from palimpsest.services.learner.training.follower import broadcast_state
from palimpsest.services.learner.training.results import merge
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.failing_backward import fail_backward
from tests.learner_parts.models import CurrentModel, load, perturb, train
from tests.records.builders import a_learner, a_row

NOW = Version(3)
LEARNER = a_learner(loss=LossConfig(entropy=0.01), micro_batch_tokens=40)
OPTIMIZER = OptimizerConfig(lr=1e-2, epsilon=1e-3, weight_decay=0.1, max_grad_norm=0.05)
"""epsilon is above the rounding of the gradients, so the step is a smooth function of them."""


def some_rows(name: str, lengths: list[int]) -> list[Row]:
    """Rows of these lengths; tokens 0, 1 and 4 are not trainable."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    rows = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(3, 250, (length,), generator=generator).tolist()
        behavior = (-5.5 + torch.randn(length, generator=generator)).tolist()
        versions = [-1, -1, NOW, NOW, -1] + [NOW] * (length - 5)
        rows.append(
            a_row(
                f"{name}{i}", tokens, versions, behavior=behavior, advantage=(-1.0) ** i * (1 + i / 3), temperature=0.8
            )
        )
    return rows


def failing_row() -> Row:
    """A row with a token id that the model does not have."""
    return a_row("failing", [5, 10**6, 7, 8, 9], [-1, -1, NOW, NOW, NOW])


CASES = {
    "uneven": [some_rows("a", [31, 6, 9, 17, 23, 8, 8]), some_rows("b", [12, 40, 7])],
    "a rank without rows in one minibatch": [some_rows("c", [9, 30, 12]), some_rows("d", [21])],
    "a rank without any rows": [some_rows("e", [14]), some_rows("f", [33])],
}
"""Case -> minibatches of one version."""
UNTRAINED_TOKEN = 253
"""A token of no other row, on which only the backward pass fails."""
FAILING = {
    "a row on which a pass fails": [[*some_rows("g", [9, 30]), failing_row()], some_rows("h", [12, 40])],
    "a row on which the backward pass fails": [
        [*some_rows("g", [9, 30, 11, 12]), a_row("failing", [5, UNTRAINED_TOKEN, 7, 8, 9], [-1, -1, NOW, NOW, NOW])],
        some_rows("h", [12, 40]),
    ],
}
"""The same, with a row that one rank leaves out."""


def main(model: Path, folder: Path) -> None:
    """Train each case from the same start, and save one file per case and rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup()
    for case, minibatches in (CASES | FAILING).items():
        torch.save(trained(model, minibatches, ranks), folder / f"{case} {ranks.rank}.pt")
    ranks.close()


def trained(folder: Path, minibatches: list[list[Row]], ranks: ProcessGroup) -> dict[str, Any]:
    """Results of this rank. Training is in float32, so only the split over ranks can make a difference."""
    model = load(folder).float()
    perturb(model, by=0.05 * ranks.rank, seed=ranks.rank)  # ranks must take the weights of rank 0
    policy = TrainablePolicy(model, OPTIMIZER)
    fail_backward(model, UNTRAINED_TOKEN, ValueError("no gradient"))
    if ranks.is_rank0:
        for gradient in policy.gradients():
            gradient.fill_(1e-3)
        policy.step()  # rank 0 resumes from a checkpoint, with moments and steps
    broadcast_state(policy, TrainingState(CurrentModel(model)), ranks)
    values, passes = scored_together(model, [row for minibatch in minibatches for row in minibatch], ranks)
    gradients: list[torch.Tensor] = []
    step = policy.step

    def noted(**_: float) -> float:
        gradients.append(torch.cat([gradient.reshape(-1) for gradient in policy.gradients()]))
        return step()

    policy.step = noted  # type: ignore[method-assign]
    own = train(policy, CurrentModel(model), ranks, minibatches, NOW, config=LEARNER)
    whole = merge(ranks.all_gather_object(own))
    return {
        "values": values,
        "passes": passes,
        "gradients": gradients,
        "masters": [master.clone() for master in policy.masters],
        "state": {name: tensor.clone() for name, tensor in policy.state().items()},
        "steps": policy.steps,
        "rejected": list(whole.rejected),
        "loss": whole.loss,
        "grad_norm": whole.grad_norm,
        "mine": [row.trajectory for scored in own.micro_batches for row in scored.batch.rows],
        "scored": sorted((row.trajectory, scored.first) for scored in whole.micro_batches for row in scored.batch.rows),
        "masked": sum(int(scored.correction.masked.sum()) for scored in whole.micro_batches),
    }


def scored_together(model: torch.nn.Module, rows: list[Row], ranks: ProcessGroup) -> tuple[list[torch.Tensor], int]:
    """Scores of each micro-batch on rank 0 (empty on other ranks), and the number of forward passes of this rank."""
    forward, passes = model_scorer(model, ranks.device), 0

    def scored(batch: PaddedBatch) -> Float32Array:
        nonlocal passes
        passes += 1
        return forward(batch)

    if not ranks.is_rank0:
        assert serve_scoring(ranks, scored) == "enough"
        return [], passes
    batches = [pad(batch) for batch in micro_batches(rows, max_tokens=40)]
    together = DistributedScorer(ranks, scored)
    values = [torch.from_numpy(values) for values in (*together(batches[:1]), *together(batches[1:]))]
    ranks.broadcast_object(("enough",))
    return values, passes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
