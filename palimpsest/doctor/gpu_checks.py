"""Checks of what runs on GPUs only: `palimpsest doctor --gpu`. They need torch, transformers and vLLM.

Each returns a finding. A check takes the device, so that tests call it on a CPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.doctor.findings import STOPS, WARNS, Finding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LENGTHS = (700, 300, 24)
"""Tokens of the rows of a checked pass."""
REDUCE_LIMIT_S = 120
"""Limit of the sum over the GPUs, in seconds."""
TOLERANCE = 2e-2
"""Largest difference of bf16 attention between a packed row and the row alone, for values of about 1."""


def kinds(capabilities: Sequence[tuple[int, int]]) -> Finding:
    """GPUs with bf16 and torch's attention for unequal rows: Ampere or later, all of one kind."""
    value = (
        f"{len(capabilities)} visible, compute capability {', '.join(f'{a}.{b}' for a, b in sorted(set(capabilities)))}"
    )
    if min(capabilities) < (8, 0):
        return Finding(
            "GPU kind", value, WARNS, "Before Ampere (8.0), bf16 is emulated, and packed rows are computed one by one.",
            "Use A100, L4, H100 or later, or select other GPUs with CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
    if len(set(capabilities)) > 1:
        return Finding(
            "GPU kind", value, WARNS, "Ranks and replicas on different GPUs round differently: old log-probs differ.",
            "Select GPUs of one kind with CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
    return Finding("GPU kind", value)


def attention(device: torch.device, head_size: int) -> Finding:
    """Packed rows have the values of each row alone, twice the same bits, whatever is in the other rows."""
    import torch

    check, generator = f"Attention, head size {head_size}", torch.Generator().manual_seed(0)

    def made(heads: int) -> Tensor:
        values = torch.randn(1, heads, sum(LENGTHS), head_size, generator=generator)
        return values.to(device, torch.bfloat16)

    heads = (8, 2, 2)
    row = [made(each) for each in heads]
    beside = [torch.cat([made(each)[:, :, : LENGTHS[0]], own[:, :, LENGTHS[0] :]], dim=2)
              for each, own in zip(heads, row, strict=True)]  # fmt: skip
    first, alone = _packed(row, LENGTHS), _packed([own[:, :, : LENGTHS[0]] for own in row], LENGTHS[:1])
    if not torch.equal(first, _packed(row, LENGTHS)):
        return Finding(
            check, "a repetition has other bits", STOPS, "Old log-probs would not be those of the training pass.",
            "Update driver and torch; set learner.layout = \"padded\" meanwhile, and report it.",
        )  # fmt: skip
    difference = float((first[:, : LENGTHS[0]].float() - alone.float()).abs().max())
    if not difference <= TOLERANCE:
        return Finding(
            check, f"a packed row differs from the row alone by {difference:.3g}", STOPS, "Log-probs would be wrong.",
            "Set learner.layout = \"padded\", and report it.",
        )  # fmt: skip
    if not torch.equal(first[:, LENGTHS[0] :], _packed(beside, LENGTHS)[:, LENGTHS[0] :]):
        return Finding(
            check, "the bits of a row depend on other rows of the pass", WARNS, "Log-probs of a token differ by "
            "rounding between passes with other rows, as they do by matrix products.", "Canaries measure this.",
        )  # fmt: skip
    return Finding(check, "the values of each row alone; same bits twice, and beside other rows")


def passes(device: torch.device, *, experts: bool) -> list[Finding]:
    """A forward pass repeats bit for bit, which old log-probs need. A backward pass may not."""
    import torch

    name = "mixture of experts" if experts else "dense model"
    model, tokens = _model(device, experts=experts), torch.arange(512, device=device)[None] % 500
    with torch.no_grad():
        first, second = (model(input_ids=tokens, use_cache=False).logits for _ in range(2))
    if not torch.equal(first, second):
        return [Finding(
            f"Forward pass, {name}", "a repetition has other bits", STOPS,
            "Old log-probs would not be those of the training pass: they are exact up to this rounding only.",
            "Unset CUBLAS_WORKSPACE_CONFIG and NVIDIA_TF32_OVERRIDE, update driver and torch, and report it.",
        )]  # fmt: skip
    gradients = [_gradient(model, tokens) for _ in range(2)]
    same = torch.equal(*gradients)
    return [
        Finding(f"Forward pass, {name}", "same bits twice"),
        Finding(f"Backward pass, {name}", "same bits twice" if same else
                "a repetition differs by rounding: allowed, and a repeated run has other weights then"),
    ]  # fmt: skip


def float32(device: torch.device) -> Finding:
    """Products of float32 are not rounded to TF32: canaries measure the rounding of bf16 by a pass in float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    expected = a.double() @ b.double().T
    error = float(((a.to(device) @ b.to(device).T).cpu().double() - expected).abs().max())
    if error > 1e-3:
        return Finding(
            "Float32", f"products differ by {error:.1g}", WARNS, "They are computed in TF32: canaries measure too "
            "little rounding, and workers may refuse right weights.",
            "Unset NVIDIA_TF32_OVERRIDE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.",
        )  # fmt: skip
    return Finding("Float32", f"products within {error:.1g}")


def all_reduce(number: int, backend: str) -> Finding:
    """The visible GPUs add up their numbers, with a process on each. backend: nccl, or gloo on a CPU."""
    import torch.multiprocessing

    if number < 2:
        return Finding("Sum over GPUs", "one GPU: not needed")
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_sum, args=(i, number, backend, folder)) for i in range(number)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(REDUCE_LIMIT_S)
        failed = [i for i, rank in enumerate(ranks) if rank.exitcode != 0 or not (Path(folder) / f"right{i}").exists()]
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
    if failed:
        return Finding(
            "Sum over GPUs", f"failed or hung on GPU {', '.join(map(str, failed))}", STOPS,
            "A learner with several ranks, and an engine with tensor_parallel, would hang.",
            "Run it again with NCCL_DEBUG=INFO. Containers: a larger /dev/shm (docker: --shm-size=1g). Virtual machine:"
            " NCCL_P2P_DISABLE=1 (docs/operations.md).",
        )  # fmt: skip
    return Finding("Sum over GPUs", f"right on {number}")


def engine() -> list[Finding]:
    """vLLM's build for GPUs, and its sleep."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return [Finding("vLLM", f"cannot be imported: {error}", STOPS, "No engine can start.", "Run `make setup`.")]
    if not current_platform.is_cuda():
        return [Finding(
            "vLLM", f"is the build for {current_platform.device_type}", STOPS, "The engine would not use the GPU.",
            "Install requirements/gpu.txt: `make setup` does it where nvidia-smi lists a GPU.",
        )]  # fmt: skip
    from vllm.device_allocator.cumem import cumem_available

    if not cumem_available:
        return [Finding("vLLM", "is the build for CUDA"), Finding(
            "vLLM's sleep", "its allocator is missing", WARNS, "rollout.engine.sleep cannot be used.",
            "Install the wheel of vLLM from requirements/gpu.txt.",
        )]  # fmt: skip
    return [Finding("vLLM", "is the build for CUDA"), Finding("vLLM's sleep", "its allocator is there")]


def _packed(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Attention of packed rows, as the learner computes it. tensors: query, key and value."""
    import torch

    from palimpsest.services.learner.model.packing import PackedRows, attend

    query, key, value = tensors
    rows = PackedRows.of(lengths, max(lengths), query.device)
    layer = torch.nn.Module()
    layer.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
    named = {"cu_seq_lens_q": rows.starts, "max_length_q": rows.longest, "scaling": query.shape[-1] ** -0.5}
    return attend(layer, query, key, value, None, **named, dropout=0.0)[0]


def _model(device: torch.device, *, experts: bool) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3MoeConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    size: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = Qwen3MoeConfig(**size, **mixture) if experts else Qwen3Config(**size)
    with _seeded():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.to(device).eval()


def _gradient(model: Any, tokens: Tensor) -> Tensor:
    """All gradients of one pass in one tensor."""
    import torch

    model.zero_grad()
    model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@contextmanager
def _seeded() -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _sum(rank: int, number: int, backend: str, folder: str) -> None:
    """A process of `all_reduce`."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("NCCL_DEBUG", "WARN")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", number), rank=rank, world_size=number)  # type: ignore[attr-defined]
    values = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(values)
    if bool((values == number * (number + 1) / 2).all()):
        (Path(folder) / f"right{rank}").touch()
    dist.destroy_process_group()
