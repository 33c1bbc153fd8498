"""Train rows of which one fails under torchrun with a sharded policy, and the same rows without it; save both.

torchrun --standalone --nproc-per-node=2 -m tests.processes.failing_rows_on_ranks MODEL FOLDER [unguarded]
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.arrays import Float32Array
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import checkpoint_activations
from palimpsest.services.learner.old_logprobs import distributed_scorer
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer, serve_scoring
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.proximal.types import Exact
from palimpsest.services.learner.sharding import pass_errors, sharded_model
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.results import merge
from tests.learner_parts.failing_backward import fail_backward
from tests.learner_parts.models import CurrentModel, train
from tests.processes.shard_on_ranks import OPTIMIZER, whole
from tests.processes.train_on_ranks import NOW, some_rows
from tests.records.builders import a_learner, a_row

ONLY, BEYOND = 253, 10**6
"""A token that one row has; one that the model lacks."""
LEARNER = a_learner(discrepancy={"band": "off"}, micro_batch_tokens=40)
EMBEDDING, BLOCK, NORM, BACKWARD, LOSS, INFINITE = (
    "the embedding",
    "a block",
    "the last norm",
    "the backward pass",
    "the loss",
    "not finite",
)
AGAIN = "the backward pass of layers that are computed again"
CASES = (EMBEDDING, BLOCK, NORM, BACKWARD, AGAIN, LOSS, INFINITE)
"""Where the row fails."""


def rows(*, token: int, advantage: float) -> list[list[Row]]:
    """Two minibatches of unevenly many micro-batches; row `bad` has this token and this advantage."""
    bad = a_row("bad", [5, 9, token, 8, 11], [-1, -1, NOW, NOW, NOW], advantage=advantage)
    return [[*some_rows("k", [35, 35, 33, 6, 5]), bad], some_rows("l", [20, 12])]


def spoil(policy: ShardedPolicy, case: str) -> None:
    """Let passes over a row with the token ONLY fail there."""
    causal, seen = policy.model.causal, [False]

    def look(_: object, arguments: tuple[torch.Tensor]) -> None:
        seen[0] = bool((arguments[0] == ONLY).any())

    def fail(*_: object) -> None:
        if seen[0]:
            raise ValueError(case)

    decoder: Any = causal
    decoder.get_input_embeddings().register_forward_pre_hook(look)
    if case == BLOCK:
        decoder.base_model.layers[1].mlp.register_forward_pre_hook(fail)
    elif case == NORM:
        decoder.base_model.norm.register_forward_pre_hook(fail)
    elif case in (BACKWARD, AGAIN, INFINITE):
        fail_backward(causal, ONLY, None if case == INFINITE else ValueError(case))


def spoil_loss(trainer: Any, case: str) -> None:
    """Let the loss of a batch with the token ONLY fail."""
    if case == LOSS:
        original = trainer._inputs

        def inputs(version: Any, place: int, *rest: Any) -> Any:
            if (version.batches[place].tokens == ONLY).any():
                raise ValueError(case)
            return original(version, place, *rest)

        trainer._inputs = inputs


class Counting(CurrentModel):
    """Counts a token as missing in each call."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.misses = MissingCounter()

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        self.misses.add(MissingReason.VERSION_GONE, "drop", 1)
        return super().proximal(batches, now, fresh)


def trained(files: ModelFiles, ranks: ProcessGroup, case: str, minibatches: list[list[Row]]) -> dict[str, Any]:
    """Results of one version after passes without gradient, and the scores of all rows on rank 0."""
    from palimpsest.services.learner.training import trainer

    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    spoil(policy, case)
    if case == AGAIN:
        policy.model(checkpoint_activations)
    scores = scored(policy, minibatches[0], ranks)
    made = trainer.Passes

    def passes(*arguments: Any) -> Any:
        own = made(*arguments)
        spoil_loss(own, case)
        return own

    trainer.Passes = passes  # type: ignore[misc, assignment]
    try:
        source = Counting(policy.model)
        own = train(policy, source, ranks, minibatches, NOW, config=LEARNER, misses=source.misses)
    finally:
        trainer.Passes = made  # type: ignore[misc]
    together = merge(ranks.all_gather_object(own))
    return {
        "scores": scores,
        "rejected": together.rejected,
        "masters": whole(policy, "data"),
        "loss": together.loss,
        "norm": together.grad_norm,
        "steps": policy.steps,
        "skipped": together.skipped,
        "missed": together.missed,
    }


def scored(policy: ShardedPolicy, wanted: list[Row], ranks: ProcessGroup) -> dict[str, torch.Tensor]:
    """Row -> its log-probs, on rank 0."""
    forward = model_scorer(policy.model, ranks.device)
    if not ranks.is_rank0:
        assert serve_scoring(ranks, forward) == "enough"
        return {}
    batches = [pad(batch) for batch in micro_batches(wanted, max_tokens=40)]
    values: list[Float32Array] = DistributedScorer(ranks, forward)(batches)
    ranks.broadcast_object(("enough",))
    return {
        row.trajectory: torch.from_numpy(own[i, : len(row.tokens)])
        for batch, own in zip(batches, values, strict=True)
        for i, row in enumerate(batch.rows)
    }


def main(model: str, folder: Path, *, guarded: bool) -> None:
    """Save one file per case and rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    files = ModelFiles(model, "eager", init_device_mesh("cpu", (ranks.size,)), ranks.device)
    if not guarded:
        for module in (pass_errors, sharded_model, distributed_scorer):
            module.may_be_of_row = lambda _: False  # type: ignore[attr-defined]
    for case in CASES:
        token = BEYOND if case == EMBEDDING else ONLY
        saved = {
            "failing": trained(files, ranks, case, rows(token=token, advantage=1.0)),
            "expected": trained(files, ranks, case, rows(token=7, advantage=0.0)),
        }
        torch.save(saved, folder / f"{case} {ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), guarded=sys.argv[3:] != ["unguarded"])
