"""R3: the experts that the engine chose travel with the trajectory, and both passes of the learner replay them."""

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.messages import TRAJECTORIES, TrajectoryFinished, decode, encode
from palimpsest.common.routes import FREE, RouteShape, check_routes, route_shape
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.rescore import Models, rescore
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.batch.collate import to_rows
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.ingest.validation import validate
from palimpsest.services.learner.model.policy import load_model, score_batch
from palimpsest.services.learner.model.routing import as_routes, recorded
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.version_record import Batch
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.rollout.engine.port import SampledTokens, Span
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from palimpsest.services.rollout.trajectory_builder import Contradiction, TrajectoryBuilder
from tests.learner_parts.families import build
from tests.learner_parts.models import CPU, canaries, load, perturb, stored, train
from tests.records.builders import UNCORRECTED, a_finished, a_learner

pytestmark = pytest.mark.thorough

NOW = Version(1)


def sampled(folder: Path, model: torch.nn.Module, shape: RouteShape, prompt: list[int]) -> TrajectoryFinished:
    """A trajectory of two messages; the version changes after the first one."""
    config = ScriptedEngineConfig(kind="scripted", texts=("abcdef",), tokens_per_s=1e6)
    engine = ScriptedEngine(config, encode=lambda text: [ord(each) for each in text], routes=shape)

    async def dialogue() -> TrajectoryBuilder:
        builder = TrajectoryBuilder(prompt)
        for version in range(2):
            await engine.pause()
            await engine.load(stored(model, version, folder))
            await engine.resume()
            builder.add_sampled(
                await engine.generate(builder.tokens, request=f"g#{version}", temperature=1.0, max_tokens=5, stop=(2,))
            )
            if version == 0:
                builder.add_environment([7, 8, 9])
        return builder

    builder = asyncio.run(dialogue())
    record = msgspec.structs.replace(a_finished(0, 0), tokens=builder.pack(), segments=builder.segments)
    received = decode(TRAJECTORIES, encode(record))
    assert isinstance(received, TrajectoryFinished)
    return received


def of_tokens(tokens: np.ndarray, shape: RouteShape) -> np.ndarray:
    """The experts that the scripted engine gives these tokens."""
    places = np.arange(shape.layers)[:, None] + np.arange(shape.of_token)
    return (tokens[:, None, None] + places) % shape.experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("Qwen3-MoE", tmp_path_factory.mktemp("models") / "model")


def test_each_position_up_to_the_last_sampled_token_has_its_experts_once(folder: Path, tmp_path: Path) -> None:
    shape = route_shape(str(folder))
    assert shape == RouteShape(layers=2, of_token=2, experts=8)
    record = sampled(tmp_path, load(folder), shape, [1, 2, 3])
    assert [len(one.routes) for one in record.segments] == [7 * 4, 8 * 4]
    validate(record, NOW, vocabulary=256, routes=shape)
    row, _ = to_rows([record, record], "dr_grpo", lowest=0, routes=shape)
    assert row.routes is not None
    assert np.array_equal(row.routes[:-1], of_tokens(row.tokens, shape)[:-1])
    assert (row.routes[-1] == FREE).all()


def test_experts_of_another_length_or_outside_the_model_are_rejected(folder: Path, tmp_path: Path) -> None:
    shape = route_shape(str(folder))
    record = sampled(tmp_path, load(folder), shape, [1, 2, 3])
    none = msgspec.structs.replace(record.segments[0], routes=b"")
    with pytest.raises(MalformedTrajectory, match="0 bytes of experts, but its positions have 28"):
        check_routes((none,), shape)
    outside = msgspec.structs.replace(record.segments[0], routes=b"\x08" * 28)
    with pytest.raises(MalformedTrajectory, match="expert 8, but a layer has 8"):
        check_routes((outside,), shape)


def test_an_engine_that_returns_too_few_positions_is_found() -> None:
    builder, experts = TrajectoryBuilder([1, 2]), np.zeros((3, 2, 2), dtype=np.uint8)
    one = SampledTokens((5, 6, 7), (-1.0,) * 3, (Span(NOW, 0, 3),), stopped=True, routes=experts)
    with pytest.raises(Contradiction, match="experts of 3 positions before 3 tokens after 2"):
        builder.add_sampled(one)


class Recorded:
    """A version trained on trajectories with the engine's experts, and its record."""

    def __init__(self, tmp_path: Path, folder: Path, store: SnapshotClient, layout: str) -> None:
        self._folder, self._model, self._packed = tmp_path, folder, layout == "packed"
        policy = load_model(str(folder), CPU, "sdpa", layout=layout) if self._packed else load(folder)
        for version in range(NOW + 1):
            perturb(policy, by=0.03, seed=version)
            store.put("test", Version(version), raw_tensors(named_weights(policy)), canaries(policy), writer=1)
        shape = route_shape(str(folder))
        records = [sampled(tmp_path, policy, shape, list(range(3, 6 + 4 * i))) for i in range(3)]
        self.rows = to_rows(records, "dr_grpo", lowest=0, routes=shape)
        source = SnapshotSource(policy, store, CPU, max_tokens=60, loaded=lambda _: None)
        self.trained: StepResult = train(
            TrainablePolicy(policy, OptimizerConfig(lr=1e-3)), source, ProcessGroup(), [self.rows], NOW,
            config=a_learner(discrepancy=UNCORRECTED, micro_batch_tokens=60, layout=layout),
        )  # fmt: skip
        BatchDump(tmp_path / "records").record(Batch(NOW, Version(NOW + 1), [], [self.rows], [], 0), self.trained)

    def unequal(self, *, engine: bool) -> int:
        attention = "sdpa" if self._packed else "eager"
        models = Models(self._folder / "store", str(self._model), attention, packed=self._packed)
        seen = rescore(self._folder / "records", models, engine=engine)
        assert seen["same_layout_tokens"] == sum(row.trainable for row in self.rows)
        unequal: int = seen["same_layout_unequal"]
        return unequal


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_both_passes_replay_them_and_rescoring_repeats_both(
    layout: str, tmp_path: Path, folder: Path, store: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the replay in the old log-probs' passes, or in all, the values are others."""
    run = Recorded(tmp_path, folder, store, layout)
    assert run.unequal(engine=True) == 0
    of_older = sum(int((row.versions == 0).sum()) for row in run.rows)
    assert run.unequal(engine=False) > of_older / 2
    monkeypatch.setattr("palimpsest.rescore.given_experts", lambda *_: nullcontext())
    assert run.unequal(engine=True) > sum(row.trainable for row in run.rows) / 2


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    """GLM-4-MoE: the first layer is dense. The engine names all layers."""
    folder = build("GLM-4-MoE", tmp_path / "model")
    model = load_model(str(folder), CPU, "sdpa")
    shape = route_shape(str(folder))
    record = sampled(tmp_path, model, shape, [1, 2, 3])
    row, _ = to_rows([record, record], "dr_grpo", lowest=0, routes=shape)
    assert row.routes is not None
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        score_batch(model, pad([row]), CPU)
    assert np.array_equal(seen[-1][:-1], row.routes[:-1, 1])


def test_the_discrepancy_falls_where_the_engine_routes_otherwise(folder: Path) -> None:
    """An engine with the same weights, whose rounding is that of float32: with its experts the learner is nearer."""
    learner, engine = load_model(str(folder), CPU, "sdpa"), load_model(str(folder), CPU, "sdpa").float()
    tokens = torch.randint(3, 250, (4, 128), generator=torch.Generator().manual_seed(5))
    rows = [Row(str(i), own.numpy().astype(np.int32), np.zeros(128, np.int32), np.zeros(128, np.float32), 1.0, 0.0, 0.0,
                success=False) for i, own in enumerate(tokens)]  # fmt: skip
    with torch.no_grad():
        with recorded(engine) as found:
            behavior = score_batch(engine, pad(rows), CPU)
        routes = as_routes(found, 4)
        free = score_batch(learner, pad(rows), CPU)
        batch = pad([replace(row, routes=routes[i]) for i, row in enumerate(rows)])
        replayed = score_batch(learner, batch, CPU)
    with_replay, without = ((behavior - own).abs().mean() for own in (replayed, free))
    assert with_replay < 0.8 * without


def test_a_dense_model_and_replicas_are_refused(starting_model: Path) -> None:
    with pytest.raises(UserError, match="names no experts"):
        route_shape(str(starting_model))
    with pytest.raises(ValueError, match='routing_replay = "engine" is not known to replicas'):
        LearnerConfig.model_validate({"versions": 1, "routing_replay": "engine", "proximal": {"kind": "replica"}})
