"""Models for tests, built once for all test processes, and their weights in the form of the store."""

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.snapshots.manifest import SCHEMA, Canary, Manifest, TensorEntry, version_digest
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.proximal.types import Exact, Source
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer
from palimpsest.services.rollout.engine.port import StoredWeights
from tools import setup

CPU = torch.device("cpu")


def build(*, tied: bool) -> Path:
    """Folder of the starting model, built once per checkout and again if its sources change. Must not be changed.

    The first caller builds it; other processes wait.
    """
    from tools.starting_model.__main__ import write

    digest = setup.model_digest()
    stamp = setup.STAMPS / "starting_model"
    if tied and stamp.is_file() and stamp.read_text() == digest and (setup.MODEL / "config.json").exists():
        return setup.MODEL  # `make setup` has built the same model
    kept = setup.STAMPS / "models"
    kept.mkdir(exist_ok=True)
    folder = kept / f"{digest[:16]}-{'tied' if tied else 'untied'}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            write(folder, tied=tied)  # atomic
    return folder


def load(folder: Path) -> torch.nn.Module:
    """Load the model with plain transformers, in bf16."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    return model.eval()


def perturb(model: torch.nn.Module, *, by: float, seed: int) -> None:
    """Add noise with this standard deviation to every weight, which makes another version."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter.float() + by * noise).to(parameter.dtype))


def stored(model: torch.nn.Module, version: int, folder: Path) -> StoredWeights:
    """The model's weights as a worker stores them before an update."""
    entries, path = [], folder / f"{version}.raw"
    with path.open("wb") as file:
        for tensor in raw_tensors(named_weights(model)):
            raw = tensor.raw.tobytes()
            entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, blake3(raw).hexdigest(), 0, 0))
            file.write(raw)
    manifest = Manifest(
        schema=SCHEMA,
        run="test",
        writer=1,
        version=Version(version),
        digest=version_digest(entries),
        encoding="base",
        object="",
        object_size=0,
        tensors=tuple(entries),
        canaries=canaries(model),
    )
    return StoredWeights(manifest, path)


def canaries(model: torch.nn.Module) -> tuple[Canary, ...]:
    """The learner's canaries for these weights, before the first batch."""
    return Canaries(model, CPU, trajectories=1, micro_batch_tokens=4096).made()


class CurrentModel:
    """Source whose proximal is the model at the time of the call: exact at staleness 0."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.calls = model, 0

    @torch.no_grad()
    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        self.calls += 1
        return Exact(
            [token_logprobs(self.model, torch.from_numpy(b.tokens), torch.from_numpy(b.temperatures)) for b in batches]
        )


def train(
    policy: TrainablePolicy,
    source: Source,
    ranks: ProcessGroup,
    minibatches: Sequence[Sequence[Row]],
    now: Version,
    *,
    config: LearnerConfig,
    length: int = 64,
    **state: Any,
) -> StepResult:
    """Train one version with this source; `state`: further fields of TrainingState."""
    trainer = Trainer(policy, TrainingState(source, **state), ranks, config, length=length, seed=0)
    return trainer.train(minibatches, now)


@torch.no_grad()
def logprobs(model: torch.nn.Module, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """Log-prob of each token after the first, by plain transformers, one row at a time."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].float() / temperature
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])
    return [float(value) for value in chosen[:, 0]]
