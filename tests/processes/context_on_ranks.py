"""Train fixed rows on ranks that share them, and on one rank alone; save both results.

torchrun --standalone --nproc-per-node=2 -m tests.processes.context_on_ranks QWEN3 LLAMA EXPERTS FOLDER
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.distributed import Context, ProcessGroup
from palimpsest.services.learner.model import context_attention as blocks
from palimpsest.services.learner.model.context import SlicedRows
from palimpsest.services.learner.model.context_attention import attend_across_ranks, causal_in_blocks
from palimpsest.services.learner.model.policy import (
    checkpoint_activations,
    load_model,
    score_batch,
    score_batch_and_entropy,
)
from palimpsest.services.learner.model.routing import routers_of
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from tests.learner_parts.routes import routes_of
from tests.processes.context_averages import AVERAGED, averages
from tests.processes.context_beside import BESIDE, beside
from tests.processes.shard_on_ranks import OPTIMIZER, own_scores, results, scores
from tests.processes.sharded_versions import canaries, walked
from tests.processes.train_on_ranks import NOW, some_rows

TOGETHER = 2
SHORT = (1, 2, 3, 7, 40)
"""Tokens of the rows of the attention alone: shorter than the number of chunks, too."""
FORWARD = some_rows("f", [5, 6, 9, 37, 64])
CASES = {"Qwen3": [some_rows("g", [20, 20, 9, 7])], "Llama": [some_rows("h", [35, 35, 33, 6, 31]), some_rows("i", [7])]}
"""Family -> minibatches of one version. The second one of Llama leaves the second of two groups without rows."""
EXPERTS = "a mixture with replayed experts"


def main(folders: dict[str, str], experts: str, folder: Path) -> None:
    """Save one file per family and rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    ranks.share_rows(TOGETHER)
    mesh = init_device_mesh("cpu", (ranks.size,))
    assert ranks.context is not None
    torch.save(attention(ranks.context), folder / f"attention {ranks.rank}.pt")
    for family, model in folders.items():
        minibatches, again = CASES[family], family == "Qwen3"
        files = ModelFiles(model, "sdpa", mesh, ranks.device, layout="packed", context=ranks.context)
        sliced = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
        whole = TrainablePolicy(load_model(model, ranks.device, "sdpa", layout="packed"), OPTIMIZER)
        saved: dict[str, Any] = {"alone": forward(whole.model), "shared": forward(sliced.model)}
        with without_offset():
            saved["shared positions"] = forward(sliced.model)
        if again:
            checkpoint_activations(whole.model)
            sliced.model(checkpoint_activations)
        rows = [row for minibatch in minibatches for row in minibatch]
        alone = one_rank()
        for name, policy, own in (("alone", whole, alone), ("shared", sliced, ranks)):
            saved[name] |= {"scores": scores(policy.model, rows, own), "own": own_scores(policy.model, rows, own)}
            saved[name] |= results(policy, minibatches, own)
        if again:
            saved["canaries"] = canaries(files, ranks, load_model(model, ranks.device, "sdpa", layout="packed"), rows)
            saved["walked"] = walked(files, ranks, folder / f"objects of {family}")
        torch.save(saved, folder / f"{family} {ranks.rank}.pt")
    files = ModelFiles(experts, "sdpa", mesh, ranks.device, layout="packed", context=ranks.context)
    torch.save(replayed_experts(files, experts, ranks), folder / f"{EXPERTS} {ranks.rank}.pt")
    for case in BESIDE:
        torch.save(beside(case, folders["Qwen3"], mesh, ranks, one_rank()), folder / f"{case} {ranks.rank}.pt")
    for kind in AVERAGED:
        torch.save(averages(kind, folders["Qwen3"], mesh, ranks), folder / f"{kind} {ranks.rank}.pt")
    ranks.close()


def replayed_experts(files: ModelFiles, path: str, ranks: ProcessGroup) -> dict[str, dict[str, Any]]:
    """Passes of a mixture with given experts, its own choice of experts, and a version trained with given ones."""
    shared = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    alone = TrainablePolicy(load_model(path, ranks.device, "sdpa", layout="packed"), OPTIMIZER)
    shared.model(checkpoint_activations)
    checkpoint_activations(alone.model)
    saved = {}
    for name, policy, own in (("alone", alone, one_rank()), ("shared", shared, ranks)):
        batch, layers = pad(FORWARD), len(routers_of(policy.model))
        with torch.no_grad():
            given = replace(batch, routes=routes_of(batch.tokens, layers))
            logprobs = score_batch(policy.model, given, own.device)
        chosen = BatchScores([batch], own.device, max_tokens=1000, fresh=0, ranks=own, record_routes=True)
        chosen.score(policy.model, chosen.of(NOW))
        saved[name] = {"logprobs": logprobs, "chosen": chosen.routes} | results(policy, CASES["Qwen3"], own)
    return saved


def forward(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Log-probs and entropies of rows of several lengths, in one pass."""
    with torch.no_grad():
        logprobs, entropies = score_batch_and_entropy(model, pad(FORWARD), torch.device("cpu"))
    return {"logprobs": logprobs, "entropies": entropies}


def one_rank() -> ProcessGroup:
    """A group of this process alone."""
    with patch.dict(os.environ, {"WORLD_SIZE": "1", "RANK": "0"}):
        return ProcessGroup()


@contextmanager
def without_offset() -> Iterator[None]:
    """Let each rank count the positions of its tokens from 0."""
    usual = SlicedRows.arguments

    def local(self: SlicedRows, tokens: torch.Tensor) -> dict[str, Any]:
        return usual(self, tokens) | {"position_ids": torch.arange(len(self.places))[None]}

    with patch.object(SlicedRows, "arguments", local):
        yield


def attention(context: Context) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Outputs and gradients of this rank's tokens, in float32: by plain torch of whole rows, and across ranks."""
    generator = torch.Generator().manual_seed(1)
    rows = SlicedRows.of(SHORT, max(SHORT), context, torch.device("cpu"))
    padded = [torch.randn(len(SHORT), 3, max(SHORT), 8, generator=generator) for _ in range(3)]
    weights = torch.randn(len(SHORT), 3, max(SHORT), 8, generator=generator)

    def own(values: torch.Tensor) -> torch.Tensor:
        """[rows, heads, length, size] -> [1, heads, own tokens, size]"""
        return values.transpose(1, 2).flatten(0, 1)[rows.places].transpose(0, 1)[None]

    whole = [values.clone().requires_grad_() for values in padded]
    expected = scaled_dot_product_attention(*whole, is_causal=True)
    real = torch.arange(max(SHORT)) < torch.tensor(SHORT)[:, None]
    (expected * weights * real[:, None, :, None]).sum().backward()  # type: ignore[no-untyped-call]
    inside = rows.inside[None, None, :, None]
    gradients = [own(values.grad) * inside for values in whole if values.grad is not None]
    found = {"alone": {"output": [own(expected.detach()) * inside], "gradients": gradients}}
    for name, send in (("shared", Context.sum_of_shares), ("gradients stay", keep)):
        mine = [own(values).contiguous().requires_grad_() for values in padded]
        with patch.object(Context, "sum_of_shares", send), patch.object(blocks, "MASK_ENTRIES", 100):
            output = attend_across_ranks(*mine, rows, lambda q, k, v: causal_in_blocks(q, k, v, plain)).transpose(1, 2)
            (output * own(weights) * inside).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [values.grad * inside for values in mine if values.grad is not None]
        found[name] = {"output": [output.detach() * inside], "gradients": gradients}
    return found


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None).transpose(1, 2)


def keep(context: Context, values: torch.Tensor) -> torch.Tensor:
    """The own part of the gradients, without those of other ranks."""
    return values.view(context.size, -1, *values.shape[1:])[context.rank]


if __name__ == "__main__":
    main({"Qwen3": sys.argv[1], "Llama": sys.argv[2]}, sys.argv[3], Path(sys.argv[4]))
