"""The discrepancy between vLLM's CPU engine and the learner, with the learner's own experts and with the engine's.

python -m tests.families.routing                # Qwen3-MoE
python -m tests.families.routing Mixtral OLMoE

The engine samples, then scores each sequence in a pass of its own, while a hook of its routers notes the experts. The
learner scores the same tokens with the same weights. Prints a line of JSON for each family: mean, 99th percentile and
maximum of |engine - learner| in nats, and the share of positions with other experts by layer.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.services.learner.batch.batching import PaddedBatch, Routes, Row, pad
from palimpsest.services.learner.model.policy import load_model, score_batch
from palimpsest.services.learner.model.routing import as_routes, recorded
from tests.learner_parts.families import attention_of, build
from tests.learner_parts.models import CPU

SEQUENCES, LENGTH, PROMPT = 32, 203, 3
ROWS = 8
"""Rows of a pass of the learner."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A sequence with the engine's log-probs and experts."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    routes: Routes

    def row(self, number: int) -> Row:
        """The sequence as a row; the prompt is untrainable."""
        length = len(self.tokens)
        return Row(
            trajectory=f"g{number:04d}/0",
            tokens=np.array(self.tokens, np.int32),
            versions=np.where(np.arange(length) < PROMPT, -1, 0).astype(np.int32),
            behavior=np.array(self.logprobs, np.float32),
            temperature=1.0,
            advantage=0.0,
            reward=0.0,
            success=False,
        )


def measure(family: str) -> dict[str, Any]:
    """Return the figures of a family."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(family, Path(folder) / "model")
        scored = list(_engine(model))
        learner = load_model(str(model), CPU, attention_of(family))
    free, replayed, others = [], [], []
    for start in range(0, len(scored), ROWS):
        part = scored[start : start + ROWS]
        batch = pad([one.row(start + i) for i, one in enumerate(part)])
        given = np.stack([one.routes for one in part])
        with torch.no_grad():
            with recorded(learner) as found:
                free.append(_discrepancy(learner, batch))
            replayed.append(_discrepancy(learner, replace(batch, routes=given)))
        others.append((np.sort(as_routes(found, len(part)), -1) != np.sort(given, -1)).any(-1).mean((0, 1)))
    return {
        "family": family,
        "tokens": sum(map(len, free)),
        "own_experts": _summary(np.concatenate(free)),
        "engine_experts": _summary(np.concatenate(replayed)),
        "other_experts_by_layer": [round(float(share), 4) for share in np.mean(others, 0)],
    }


def _discrepancy(learner: torch.nn.Module, batch: PaddedBatch) -> np.ndarray:
    values: np.ndarray = np.abs(score_batch(learner, batch, CPU).numpy() - batch.behavior)[batch.mask]
    return values


def _summary(values: np.ndarray) -> dict[str, float]:
    figures = {"mean": values.mean(), "p99": np.quantile(values, 0.99), "max": values.max()}
    return {name: round(float(value), 5) for name, value in figures.items()}


def _engine(model: Path) -> Iterator[SampledSequence]:
    """Sample sequences with vLLM in this process, and score each one alone."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(model), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=2048, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False, logprobs_mode="processed_logprobs",
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=LENGTH - PROMPT, temperature=1.0, seed=1, ignore_eos=True, detokenize=False)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": [3 + i, 40 + i, 7]} for i in range(SEQUENCES)]
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        with _noted(engine) as noted:
            (one,) = engine.generate([{"prompt_token_ids": tokens}], scoring, use_tqdm=False)
        logprobs = [
            by_token[token].logprob for token, by_token in zip(tokens[1:], one.prompt_logprobs[1:], strict=True)
        ]
        layers = [torch.cat(noted[layer])[: len(tokens)] for layer in sorted(noted)]
        yield SampledSequence(tokens, [0.0, *logprobs], torch.stack(layers, dim=1).numpy().astype(np.int16))


@contextmanager
def _noted(engine: Any) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Note the experts that the engine's routers choose in this block: layer -> those of each pass."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    noted: dict[int, list[torch.Tensor]] = {}
    worker = engine.llm_engine.model_executor.driver_worker
    modules = [each for each in worker.model_runner.model.modules() if isinstance(each, MoERunner)]
    for module in modules:

        def note(experts: torch.Tensor, layer: int = module.layer_id) -> None:
            noted.setdefault(layer, []).append(experts.clone())

        module.router.set_capture_fn(note)
    yield noted
    for module in modules:
        module.router.set_capture_fn(None)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    options = argparse.ArgumentParser(prog="python -m tests.families.routing", description=__doc__)
    options.add_argument(
        "families", nargs="*", default=["Qwen3-MoE"], help="families of tests/learner_parts/families.py"
    )
    for named in options.parse_args().families:
        print(json.dumps(measure(named)), flush=True)
