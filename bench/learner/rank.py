"""One rank of `python -m bench learner`: python -m bench.learner.rank MODE MODEL RESULT TASK

TASK is a JSON object: lengths (tokens of each row), micro_batch_tokens, vocabulary, steps.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.old_logprobs.precomputed_source import PrecomputedSource
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer

PROMPT = 8
"""First tokens of a row, which are not trained on."""
RATE = 1e-6
SHARDED, PACKED, AGAIN = ("sharded", "long", "context"), ("packed", "long", "context"), ("long", "context")
"""Modes of the learner; the bare loop is sharded by code of its own."""
Step = Callable[[], object]


def main(mode: str, model: str, result: Path, task: dict[str, Any]) -> None:
    """Measure one mode; rank 0 writes the largest values of the ranks."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=mode in SHARDED)
    if mode == "context":
        ranks.share_rows(ranks.size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _memory("VmRSS")
    batch = _rows(task["lengths"], task["vocabulary"])
    step = (
        _bare(model, batch, ranks)
        if mode == "bare"
        else _learner(mode, model, batch, ranks, micro_batch_tokens=task["micro_batch_tokens"])
    )
    step()
    sent = _Sent(ranks.size)
    if ranks.size > 1:
        with sent:
            step()
    seconds, busy = [], []
    for _ in range(task["steps"]):
        if ranks.size > 1:
            dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - used)
    own = {
        "seconds": min(seconds),
        "cpu_seconds": min(busy),
        "peak_bytes": _memory("VmHWM") - before,
        "moved_bytes": sent.bytes,
    }
    parts = ranks.all_gather_object(own)
    if ranks.is_rank0:
        result.write_text(json.dumps({name: max(part[name] for part in parts) for name in own}))
    ranks.close()


def _rows(lengths: list[int], vocabulary: int) -> list[Row]:
    numbers = np.random.default_rng(0)
    return [
        Row(
            trajectory=str(i), tokens=numbers.integers(0, 1000, length, dtype=np.int32),
            versions=np.where(np.arange(length) < PROMPT, -1, 0).astype(np.int32),
            behavior=np.full(length, -math.log(vocabulary), dtype=np.float32),
            temperature=1.0, advantage=float(i % 2) - 0.5, reward=0.0, success=False,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def _learner(mode: str, model: str, batch: list[Row], ranks: ProcessGroup, *, micro_batch_tokens: int) -> Step:
    layout: Literal["padded", "packed"] = "packed" if mode in PACKED else "padded"
    config = LearnerConfig(
        versions=1, micro_batch_tokens=micro_batch_tokens, optimizer=OptimizerConfig(lr=RATE), layout=layout
    )
    policy: TrainablePolicy
    if mode in SHARDED:
        mesh = init_device_mesh("cpu", (ranks.size,))
        files = ModelFiles(model, "sdpa", mesh, ranks.device, layout=layout, context=ranks.context)
        policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), config.optimizer, ranks)
        if mode in AGAIN:
            policy.model(checkpoint_activations)
    else:
        policy = TrainablePolicy(load_model(model, ranks.device, "sdpa", layout=layout), config.optimizer)
    source = PrecomputedSource(
        policy.model, ranks.device, max_tokens=micro_batch_tokens, missing="fail", why=MissingReason.NOT_SCORED,
        misses=MissingCounter(), ranks=ranks,
    )  # fmt: skip
    longest = max(len(row.tokens) for row in batch)
    trainer = Trainer(policy, TrainingState(source), ranks, config, length=longest, seed=0)
    return lambda: trainer.train([batch], Version(0))


def _bare(path: str, batch: list[Row], ranks: ProcessGroup) -> Step:
    """Cross-entropy of the same rows, without the learner."""
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh("cpu", (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, foreach=True)
    own = [torch.from_numpy(row.tokens.astype(np.int64))[None] for row in batch[ranks.rank :: ranks.size]]

    def step() -> None:
        for tokens in own:
            logits = model(input_ids=tokens, use_cache=False).logits[0, PROMPT - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, PROMPT:]) / len(own)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that this rank sends in collectives of torch.distributed."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        share = (ranks - 1) / ranks
        self._factors = {
            "_allgather_base_": ranks - 1.0,
            "allgather_": ranks - 1.0,
            "alltoall_base_": share,
            "_reduce_scatter_base_": share,
            "allreduce_": 2 * share,
        }
        self.bytes = 0.0

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Count the input of a collective, then call it."""
        name = str(function).split(".")[1]
        if name in self._factors:
            given = arguments[0] if name == "allreduce_" else arguments[1]
            for tensor in tree_leaves(given):
                self.bytes += self._factors[name] * tensor.numel() * tensor.element_size()
        return function(*arguments, **(named or {}))


def _memory(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024.0 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
