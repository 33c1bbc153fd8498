"""Train rows of which one fails under torchrun with a sharded policy, and the same rows without it; save both.

torchrun --standalone --nproc-per-node=2 -m tests.processes.failing_rows_on_ranks MODEL FOLDER [unguarded]
torchrun --standalone --nproc-per-node=N -m tests.processes.failing_rows_on_ranks MODEL FOLDER shared CASE...

shared: two ranks share each row. The row fails on the second rank of its group.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.arrays import Float32Array
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.context import SlicedRows
from palimpsest.services.learner.model.policy import checkpoint_activations
from palimpsest.services.learner.old_logprobs import distributed_scorer
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer, serve_scoring
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.proximal.types import Exact
from palimpsest.services.learner.sharding import pass_errors, sharded_model
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.results import merge
from tests.learner_parts.adapters import LORA, renew
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
ATTENTION, GATHERED = "an attention, before the exchange of keys", "the log-probs, after their exchange"
LATER, LATER_AGAIN = "the backward pass of the last layer", "the backward pass of the last layer, computed again"
OUTPUT = "the backward pass, before that of the last layer"
ADAPTED_BLOCK, ADAPTED_BACKWARD = "a block with an adapter", "the backward pass of the last layer with an adapter"
SHARED_CASES = (*CASES, ATTENTION, GATHERED, LATER, LATER_AGAIN, OUTPUT, ADAPTED_BLOCK, ADAPTED_BACKWARD)
"""The same, where ranks share rows."""


def rows(*, token: int, advantage: float) -> list[list[Row]]:
    """Two minibatches of unevenly many micro-batches; row `bad` has this token and this advantage."""
    bad = a_row("bad", [5, 9, token, 8, 11], [-1, -1, NOW, NOW, NOW], advantage=advantage)
    return [[*some_rows("k", [35, 35, 33, 6, 5]), bad], some_rows("l", [20, 12])]


def spoil(policy: ShardedPolicy | AdapterPolicy, case: str) -> Callable[[], None]:
    """Let passes over a row with the token ONLY fail there. Return what fails after the exchange of log-probs."""
    causal, seen = policy.model.causal, [False]

    def look(_: object, arguments: tuple[torch.Tensor]) -> None:
        seen[0] = bool((arguments[0] == ONLY).any())

    def fail(*_: object) -> None:
        if seen[0]:
            raise ValueError(case)

    decoder: Any = causal
    decoder.get_input_embeddings().register_forward_pre_hook(look)
    if case in (BLOCK, ADAPTED_BLOCK):
        decoder.base_model.layers[1].mlp.register_forward_pre_hook(fail)
    elif case == NORM:
        decoder.base_model.norm.register_forward_pre_hook(fail)
    elif case == ATTENTION:
        decoder.base_model.layers[1].self_attn.register_forward_pre_hook(fail)
    elif case in (BACKWARD, AGAIN, INFINITE):
        fail_backward(causal, ONLY, None if case == INFINITE else ValueError(case))
    elif case in (LATER, LATER_AGAIN, OUTPUT, ADAPTED_BACKWARD):
        fail_backward(causal, ONLY, ValueError(case), layer=1, after=case == OUTPUT)
    return fail if case == GATHERED else lambda: None


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

    policy: ShardedPolicy | AdapterPolicy
    if files.adapted:
        adapted = files.build(holds=COMPUTES, trains=True)
        renew(adapted, seed=7)
        policy = AdapterPolicy(adapted, OPTIMIZER)
    else:
        policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    after_exchange = spoil(policy, case)
    if case in (AGAIN, LATER_AGAIN):
        policy.model(checkpoint_activations)
    made, whole_values = trainer.Passes, SlicedRows.whole

    def exchanged(own: SlicedRows, values: torch.Tensor) -> torch.Tensor:
        gathered = whole_values(own, values)
        after_exchange()
        return gathered

    def passes(*arguments: Any) -> Any:
        own = made(*arguments)
        spoil_loss(own, case)
        return own

    trainer.Passes = passes  # type: ignore[misc, assignment]
    SlicedRows.whole = exchanged  # type: ignore[method-assign]
    try:
        scores = scored(policy, minibatches[0], ranks)
        source = Counting(policy.model)
        own = train(policy, source, ranks, minibatches, NOW, config=LEARNER, misses=source.misses)
    finally:
        trainer.Passes = made  # type: ignore[misc]
        SlicedRows.whole = whole_values  # type: ignore[method-assign]
    together = merge(ranks.gather_shares(own))
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


def scored(policy: ShardedPolicy | AdapterPolicy, wanted: list[Row], ranks: ProcessGroup) -> dict[str, torch.Tensor]:
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


def main(model: str, folder: Path, *, guarded: bool, shared: Sequence[str]) -> None:
    """Save one file per case and rank. shared: the cases with ranks that share rows; none: the others."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    ranks.share_rows(2 if shared else 1)
    layout, attention = ("packed", "sdpa") if shared else ("padded", "eager")
    mesh = init_device_mesh("cpu", (ranks.size,))
    make = partial(ModelFiles, model, attention, mesh, ranks.device, layout=layout, context=ranks.context)
    if not guarded:
        for module in (pass_errors, sharded_model, distributed_scorer):
            module.may_be_of_row = lambda _: False  # type: ignore[attr-defined]
    for case in shared or CASES:
        token = BEYOND if case == EMBEDDING else ONLY
        files = make(lora=LORA) if case in (ADAPTED_BLOCK, ADAPTED_BACKWARD) else make()
        saved = {
            "failing": trained(files, ranks, case, rows(token=token, advantage=1.0)),
            "expected": trained(files, ranks, case, rows(token=7, advantage=0.0)),
        }
        torch.save(saved, folder / f"{case} {ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    what, *cases = sys.argv[3:] or ["guarded"]
    main(sys.argv[1], Path(sys.argv[2]), guarded=what != "unguarded", shared=cases)
