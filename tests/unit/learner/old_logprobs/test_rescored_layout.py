"""`palimpsest rescore` repeats every pass of the learner bit for bit, and finds values of other weights."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from palimpsest.common.base_model import base_digest
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version
from palimpsest.rescore import Models, rescore
from palimpsest.rescore_records import Lacking
from palimpsest.services.learner.batch.batching import FREE, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.policy import load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.version_record import Batch
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.old_logprobs.precomputed_source import PrecomputedSource
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.types import Source
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.trainer import Trainer
from tests.learner_parts.adapters import ADAPTER, ATTENTION_ADAPTER, ATTENTION_LORA, LORA, renew
from tests.learner_parts.families import build
from tests.learner_parts.models import CPU, canaries, load, logprobs, perturb, train
from tests.records.builders import UNCORRECTED, a_learner, a_row

NOW = Version(2)


class Recorded:
    """A version trained on rows of versions 0 to 2 in two minibatches, and its record."""

    def __init__(
        self, folder: Path, model: Path, store: SnapshotClient, kind: str, *, layout: str = "padded", lora: bool = False
    ) -> None:
        self._folder, self._model, self._packed = folder, model, layout == "packed"
        policy = load_model(str(model), CPU, "sdpa", layout="packed") if self._packed else load(model)
        mixture = kind == "routes"
        if lora:
            add_adapter(policy, ATTENTION_LORA if mixture else LORA)
        form = ATTENTION_ADAPTER if mixture else ADAPTER
        adapter = structs.replace(form, base=base_digest(str(model))) if lora else None
        for version in range(NOW + 1):
            if lora:
                renew(policy, seed=version)
            else:
                perturb(policy, by=0.03, seed=version)
            weights = raw_tensors(named_weights(policy))
            store.put("test", Version(version), weights, canaries(policy), writer=1, adapter=adapter)
        source: Source = SnapshotSource(
            policy, store, CPU, max_tokens=60, loaded=lambda _: None, record_routes=kind == "routes", adapter=adapter
        )
        if kind == "precomputed":
            source = PrecomputedSource(
                policy, CPU, max_tokens=60, missing="fail", why=MissingReason.TOO_LATE, misses=MissingCounter()
            )
        self.minibatches = [self._rows(policy, kind, of) for of in (range(5), range(5, 9))]
        self.trained: StepResult = train(
            TrainablePolicy(policy, OptimizerConfig(lr=1e-2)), source, ProcessGroup(), self.minibatches, NOW,
            config=a_learner(discrepancy=UNCORRECTED, minibatches=2, micro_batch_tokens=60, layout=layout),
        )  # fmt: skip
        rows = [list(minibatch) for minibatch in self.minibatches]
        BatchDump(folder / "records").record(Batch(NOW, Version(NOW + 1), [], rows, [], 0), self.trained)

    def rescored(self, *, shared: bool = False) -> dict[str, Any]:
        attention = "sdpa" if self._packed else "eager"
        models = Models(self._folder / "store", str(self._model), attention, packed=self._packed)
        return rescore(self._folder / "records", models, shared=shared)

    @staticmethod
    def _rows(model: torch.nn.Module, kind: str, numbers: range) -> list[Row]:
        """Rows of two or three versions; kind precomputed: older tokens come with a value."""
        rows = []
        for i in numbers:
            versions = [-1, -1, *[i % 3] * (2 + i), -1, *[min(2, i % 3 + 1)] * 3, *[2] * (i % 2)]
            tokens = torch.randint(3, 250, (len(versions),), generator=torch.Generator().manual_seed(i)).tolist()
            row = a_row(f"g{i}/0", tokens, versions, temperature=1.0 - 0.1 * (i % 2))
            plain = np.array([0.0, *logprobs(model, tokens, row.temperature)], dtype=np.float32)
            row = replace(row, behavior=np.where(row.versions >= 0, plain, np.float32(0)))
            arrived = (row.versions >= 0) & (row.versions < NOW)
            rows.append(replace(row, old=np.where(arrived, plain, np.nan)) if kind == "precomputed" else row)
        return rows


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_replayed_routes_are_repeated_bit_for_bit(
    layout: str, lora: bool, tmp_path: Path, store: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training passes replay the experts of older versions; without these the values differ."""
    run = Recorded(tmp_path, build("Qwen3-MoE", tmp_path / "model"), store, "routes", layout=layout, lora=lora)
    replayed = [one.batch.routes for one in run.trained.micro_batches if one.batch.routes is not None]
    assert any((routes == FREE).any() and (routes != FREE).any() for routes in replayed)
    rows = [row for minibatch in run.minibatches for row in minibatch]
    assert run.rescored()["same_layout_tokens"] == sum(row.trainable for row in rows)
    assert run.rescored()["same_layout_unequal"] == 0
    monkeypatch.setattr("palimpsest.rescore.given_experts", lambda *_: nullcontext())
    assert run.rescored()["same_layout_unequal"] > 0


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["snapshot", "precomputed"])
def test_every_pass_is_repeated_bit_for_bit(
    kind: str, layout: str, tmp_path: Path, starting_model: Path, store: SnapshotClient
) -> None:
    run = Recorded(tmp_path, starting_model, store, kind, layout=layout)
    seen, rows = run.rescored(), [row for minibatch in run.minibatches for row in minibatch]
    trainable = sum(row.trainable for row in rows)
    of_now = sum(int((row.versions == NOW).sum()) for row in rows)
    assert seen["tokens"] == trainable
    assert seen["same_layout_tokens"] == (trainable if kind == "snapshot" else of_now)
    assert seen["same_layout_unequal"] == 0
    passes = [one.passes for one in run.trained.micro_batches]
    assert {one.first for one in run.trained.micro_batches if -2 in (one.passes if one.passes is not None else ())} == {
        True
    }
    assert max(int(own.max()) for own in passes if own is not None) >= 0


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_passes_with_an_adapter_are_repeated_bit_for_bit(
    layout: str, tmp_path: Path, starting_model: Path, store: SnapshotClient
) -> None:
    run = Recorded(tmp_path, starting_model, store, "snapshot", layout=layout, lora=True)
    seen = run.rescored()
    assert seen["same_layout_tokens"] == sum(row.trainable for rows in run.minibatches for row in rows)
    assert seen["same_layout_unequal"] == 0


def test_a_value_from_after_a_step_is_found(
    tmp_path: Path, starting_model: Path, store: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the guard "first minibatch only" the second minibatch takes values of changed weights."""
    monkeypatch.setattr(Trainer, "_fresh", lambda _, minibatches: sum(map(len, minibatches)))
    run = Recorded(tmp_path, starting_model, store, "snapshot")
    late = sum(int((row.versions == NOW).sum()) for row in run.minibatches[1])
    assert run.rescored()["same_layout_unequal"] > late / 2


def test_a_record_without_a_layout_is_refused(tmp_path: Path, starting_model: Path, store: SnapshotClient) -> None:
    run = Recorded(tmp_path, starting_model, store, "snapshot")
    (file,) = (tmp_path / "records").glob("*.npz")
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays.files if not name.startswith("passes")}
    np.savez(file, **kept)
    with pytest.raises(Lacking, match="lacks passes_0: an older release recorded the run"):
        run.rescored()


def test_a_run_whose_ranks_share_rows_is_compared_alone_only(
    tmp_path: Path, starting_model: Path, store: SnapshotClient
) -> None:
    """No pass of one process has the layout of learner.context_parallel."""
    run = Recorded(tmp_path, starting_model, store, "snapshot")
    seen = run.rescored(shared=True)
    assert (seen["same_layout_tokens"], seen["same_layout_unequal"]) == (0, 0)
    assert seen["tokens"] == sum(row.trainable for minibatch in run.minibatches for row in minibatch)
