"""Cost of old log-probs for rows of 1, 2 and 4 versions: the learner's training alone, with the versions in the rows
chosen.

Every variant trains its own policy with the real trainer and source, in turns. A row has a prompt of two tokens, and
equal parts of W consecutive versions. The last one is the version trained at in every third row, the one before it in
the next, and so on. The formula for exact log-probs is (W + 1) / 2 passes over a row, one less if its last version is
the one trained at.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import torch

from bench.routes.figures import extra_cpu_s, extra_s, step_cpu_s, step_s
from bench.routes.instrumented_learner import CountingStore, VersionTimer, instrument_source
from bench.routes.variants import REFERENCE, Load, Place, Shape, Variant, run_config
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import load_model, score_batch
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs import passes
from palimpsest.services.learner.proximal.surrogates import forward_pass
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.trainer import Trainer
from tools.backends.ports import free

WIDTHS = (1, 2, 4)
AGES = 3
"""Versions, from the one trained at on, that the last version of a row is one of."""
PROMPT = 2
VARIANTS = (
    Variant(REFERENCE, {"kind": "bypass"}),
    Variant("snapshot", {"kind": "snapshot"}),
    Variant("current_recompute", {"kind": "current_recompute"}),
    Variant("ewma_prox", {"kind": "ewma_prox"}),
)
LIMIT_S = 120.0


def formula(width: int) -> float:
    """Return the mean passes over a row of `width` versions that exact log-probs need."""
    return (width + 1) / 2 - 1 / AGES


def rows_of(width: int, now: Version, *, load: Load, vocabulary: int, seed: int) -> list[Row]:
    """Return the rows of a batch at version `now`."""
    draw = np.random.default_rng([seed, width, now])
    rows = []
    for i in range(load.trajectories):
        last, part = now - i % AGES, load.tokens // width
        versions = [UNTRAINABLE] * PROMPT + list(range(last - width + 1, last + 1)) * part
        versions[PROMPT:] = sorted(versions[PROMPT:])
        behavior = np.where(
            np.array(versions) < 0, 0.0, -np.log(vocabulary) + 0.1 * draw.standard_normal(len(versions))
        )
        reward = float(draw.random())
        rows.append(
            Row(
                trajectory=f"g{i // load.samples:06d}/{i % load.samples}",
                tokens=draw.integers(0, vocabulary, len(versions), dtype=np.int32),
                versions=np.array(versions, dtype=np.int32),
                behavior=behavior.astype(np.float32),
                temperature=1.0,
                advantage=reward - 0.5,
                reward=reward,
                success=reward > 0.5,
                group=f"g{i // load.samples:06d}",
            )
        )
    return rows


@dataclass
class Learner:
    """A policy, its source, and the measurements of its versions."""

    variant: Variant
    config: RunConfig
    store: CountingStore
    timer: VersionTimer
    stack: ExitStack
    measured: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        learner, ranks = self.config.learner, ProcessGroup()
        self.policy = TrainablePolicy(
            load_model(self.config.model.path, ranks.device, self.config.model.attention), learner.optimizer
        )
        state = build_training_state(learner, self.policy, self.store, ranks.device, on_load=lambda _: None)
        instrument_source(self.stack, state, self.timer)
        self.trainer = Trainer(self.policy, state, ranks, learner, length=10_000, seed=0)

    def train(self, rows: Sequence[Row], now: Version) -> None:
        """Train one version and store its measurements."""
        self.timer.reset()
        with counted_passes(self.timer), self.timer.time("train"):
            trained = self.trainer.train([rows], now)
        self.timer.seconds["passes"], self.timer.seconds["step"] = trained.seconds["passes"], trained.seconds["step"]
        self.measured.append(self.timer.measurements())


@contextmanager
def counted_passes(timer: VersionTimer) -> Iterator[None]:
    """Count the rows and tokens of the passes that a source makes."""

    def score(model: torch.nn.Module, batch: PaddedBatch, *rest: Any, **named: Any) -> torch.Tensor:
        timer.counts["passes"] += 1
        timer.counts["pass_tokens"] += sum(len(row.tokens) for row in batch.rows)
        return score_batch(model, batch, *rest, **named)

    with patch.object(passes, "score_batch", score), patch.object(forward_pass, "score_batch", score):
        yield


def measure(shape: Shape, load: Load, *, folder: Path, model: Path, versions: int) -> dict[str, dict[str, Any]]:
    """Return the figures of every number of versions in a row, by variant."""
    found = {}
    for width in WIDTHS:
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # learner.threads
            timer = VersionTimer()
            port = free()
            place = Place(folder / f"rows-{width}", model, port, port)
            configs = {variant.name: run_config(variant, load, place) for variant in VARIANTS}
            store = stack.enter_context(started(configs["snapshot"], place.folder))
            store.timer = timer
            learners = [Learner(variant, configs[variant.name], store, timer, stack) for variant in VARIANTS]
            first = Version(width + AGES)
            writer = Writer(store)
            writer.begin()
            exact = next(learner for learner in learners if learner.variant.name == "snapshot")
            for version in range(first + 1):
                put(exact, Version(version), writer.epoch)
            for turn in range(versions + 1):
                now = Version(first + turn)
                rows = rows_of(width, now, load=load, vocabulary=shape.vocabulary, seed=turn)
                for learner in (*learners[turn % len(learners) :], *learners[: turn % len(learners)]):
                    learner.train(rows, now)
                put(exact, Version(now + 1), writer.epoch)
            found[str(width)] = {
                learner.variant.name: figures(learner.measured[1:], width, load) for learner in learners
            }
    return found


def figures(measured: Sequence[Mapping[str, Any]], width: int, load: Load) -> dict[str, Any]:
    """Return the figures of one variant: medians of the shares, means of the counts."""
    tokens = load.trajectories * (PROMPT + width * (load.tokens // width)) * len(measured)
    return {
        "extra_step_share": round(median(extra_s(version) / step_s(version) for version in measured), 5),
        "extra_cpu_share": round(median(extra_cpu_s(version) / step_cpu_s(version) for version in measured), 5),
        "extra_s": round(median(map(extra_s, measured)), 5),
        "step_s": round(median(map(step_s, measured)), 5),
        "passes_per_row": round(sum(version["counts"].get("pass_tokens", 0) for version in measured) / tokens, 3),
        "formula": round(formula(width), 3),
        "passes": sum(version["counts"].get("passes", 0) for version in measured) / len(measured),
        "loads": sum(version["counts"].get("loads", 0) for version in measured) / len(measured),
    }


def show(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print the table."""
    heads = ("step", "of step", "of CPU", "passes/row", "formula", "loads")
    print(f"\n{'versions in a row':20} {'route':18}", *(f"{head:>10}" for head in heads))
    for width, variants in found.items():
        for name, route in variants.items():
            expected = f"{route['formula']:10.2f}" if name == "snapshot" else " " * 10
            print(
                f"{width:20} {name:18} {route['step_s']:10.2f} {route['extra_step_share']:10.1%} "
                f"{route['extra_cpu_share']:10.1%} {route['passes_per_row']:10.2f} {expected} {route['loads']:10.1f}"
            )


def put(learner: Learner, version: Version, epoch: int) -> None:
    """Store the policy as this version."""
    model = learner.policy.model
    device = next(model.parameters()).device
    canaries = Canaries(model, device, trajectories=1, micro_batch_tokens=1024).made()
    learner.store.put("rows", version, raw_tensors(named_weights(model)), canaries, writer=epoch)


@contextmanager
def started(config: RunConfig, folder: Path) -> Iterator[CountingStore]:
    """Start a store, and yield a client that counts loads."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "store.toml"
    file.write_text(to_toml(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PALIMPSEST_", "AWS_"))}
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", "palimpsest.services.snapshot_store", str(file)],
        env=environment,
        preexec_fn=lambda: die_with_parent(parent),
    )
    try:
        url = f"http://127.0.0.1:{config.snapshot_store.port}"
        deadline = time.monotonic() + LIMIT_S
        while not _answers(url):
            assert process.poll() is None, f"the store ended with {process.returncode}"
            assert time.monotonic() < deadline, "the store does not answer"
            time.sleep(0.1)
        with CountingStore(url, compression=config.snapshot_store.compression) as store:
            yield store
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10.0).status_code == 200
    except httpx.TransportError:
        return False
