"""Memory and speed of log-probs and their gradients, before and after chunking.

    .venv/bin/python -m bench memory [--hidden 64] [--tokens 256] [--vocabularies 1024 151936] [--full-gib 4]

For each number of tokens and vocabulary entries, both computations run in this process, in turn, on the same bf16
hidden states and head: log-probs and entropies forward, then the gradients of the mean log-prob.

    full      all logits at once, as float32; entropies with them (the formula before chunking)
    chunked   services/learner/model/logprobs.py

Peak: maximum of the bytes in tensors at one time, without hidden states, weight and their gradients. It is counted from
the allocations, so it does not depend on the machine. `full` is null if its 20 bytes for each token and entry exceed
the free memory or `--full-gib`. On a CPU, tokens per second count processor time, so that other programs hardly change
them.

Prints one JSON line: settings, a list of cases with peaks (bytes) and tokens per second, peak_ratio (chunked / full,
maximum of the cases) and tokens_per_s_ratio (chunked / full, geometric mean of the cases).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.plan.live_bytes import LiveBytes
from palimpsest.services.learner.model.logprobs import Positions, chunked_logprobs
from palimpsest.services.learner.model.output_head import LinearHead, Transform

FULL_BYTES = 20
"""Bytes that `full` needs for each token and vocabulary entry."""
Pass = Callable[[Tensor, Tensor, Positions], tuple[Tensor, Tensor]]


def main(words: Sequence[str]) -> dict[str, Any]:
    """Measure every case. Returns the result."""
    arguments = argparse.ArgumentParser(
        prog="python -m bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--hidden", type=int, default=64, help="hidden size (default 64)")
    arguments.add_argument("--chunk", type=int, default=1024, help="learner.logprob_chunk_tokens (default 1024)")
    arguments.add_argument("--repeats", type=int, default=3, help="measured passes; the fastest counts (default 3)")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    arguments.add_argument("--vocabularies", type=int, nargs="+", default=[1024, 32768, 151936])
    arguments.add_argument("--threads", type=int, default=1, help="learner.threads (default 1)")
    arguments.add_argument("--full-gib", type=float, default=float("inf"), help="memory that `full` may use")
    options = arguments.parse_args(words)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        case(tokens, vocabulary, options.hidden, options.chunk, options.repeats, device, options.full_gib * 2**30)
        for vocabulary in options.vocabularies
        for tokens in options.tokens
    ]
    both = [case for case in cases if case["full"] is not None]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "hidden": options.hidden,
        "chunk_tokens": options.chunk,
        "cases": cases,
        "peak_bytes": max(case["chunked"]["peak_bytes"] for case in cases),
        "peak_ratio": max((c["chunked"]["peak_bytes"] / c["full"]["peak_bytes"] for c in both), default=None),
        "tokens_per_s_ratio": statistics.geometric_mean(
            case["chunked"]["tokens_per_s"] / case["full"]["tokens_per_s"] for case in both
        )
        if both
        else None,
    }


def case(
    tokens: int, vocabulary: int, hidden: int, chunk: int, repeats: int, device: torch.device, full_bytes: float
) -> dict[str, Any]:
    """Measure both computations on one shape. `full` is None if it needs more than full_bytes or the free memory."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(device, torch.bfloat16)
    weight.requires_grad_()
    positions = Positions(
        targets=torch.randint(vocabulary, (tokens,), generator=generator).to(device),
        temperatures=torch.ones(tokens, 1, device=device),
        wanted=torch.ones(tokens, dtype=torch.bool, device=device),
        scaled=False,
    )

    def chunked(states: Tensor, weight: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        return chunked_logprobs(LinearHead(weight, None, Transform()), states, positions, chunk, entropy=True)

    fits = FULL_BYTES * tokens * vocabulary < min(full_bytes, free(device))
    passes: dict[str, Pass] = {"full": full} if fits else {}
    steps = {
        name: partial(step, one, states, weight, positions) for name, one in (passes | {"chunked": chunked}).items()
    }
    known = [states, weight, *positions[:3]]
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (states, weight))
    peaks = {name: max(0, peak_bytes(one, known) - gradients) for name, one in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, one in steps.items():  # in turn, so that other load of the machine meets both
            seconds[name].append(duration(one, device))
    measured = {
        name: {"peak_bytes": peaks[name], "tokens_per_s": round(tokens / min(seconds[name]), 1)} for name in steps
    }
    return {"tokens": tokens, "vocabulary": vocabulary, "full": None} | measured


def full(states: Tensor, weight: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies by the formula before chunking. [tokens] each"""
    logits = (states @ weight.T).float() / positions.temperatures
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, positions.targets[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def step(one: Pass, states: Tensor, weight: Tensor, positions: Positions) -> None:
    """Compute log-probs and entropies, then the gradients of the mean log-prob."""
    logprobs, entropies = one(states, weight, positions)
    torch.autograd.grad(logprobs.mean(), (states, weight))
    del entropies  # the learner keeps them and their autograd graph until the end of the backward pass


def peak_bytes(one: Callable[[], None], known: Sequence[Tensor]) -> int:
    """Return the maximum of the bytes in tensors during a step, without those of `known`."""
    with LiveBytes(known) as live:
        one()
    peak: int = live.peak
    return peak


def duration(one: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a step. On a CPU they are processor time by thread, which excludes waiting for others."""
    synchronize(device)
    on_cpu = device.type == "cpu"
    now = time.process_time if on_cpu else time.perf_counter
    began = now()
    one()
    synchronize(device)
    return (now() - began) / (torch.get_num_threads() if on_cpu else 1)


def free(device: torch.device) -> int:
    """Return the free bytes on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
