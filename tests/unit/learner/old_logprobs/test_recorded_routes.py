"""R2: the passes for old log-probs record the experts, and the training pass replays those of each token's version."""

from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version
from palimpsest.rescore import score
from palimpsest.rescore_routing import given_experts
from palimpsest.services.learner.batch.batching import FREE, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.training.results import StepResult
from tests.learner_parts.families import build
from tests.learner_parts.models import CPU, canaries, load, perturb, train
from tests.records.builders import UNCORRECTED, a_learner, a_row

pytestmark = pytest.mark.thorough

NOW = Version(2)
OF_TWO = [-1, -1, 0, 0, 0, -1, -1, 1, 1, 1]
"""Versions of the tokens of a row: prompt, message, tool, message."""
OF_POSITIONS = [0, 0, 0, 0, 1, 1, 1, 1, 1, None]
"""Version whose pass gives the experts of each position: the next trainable token's."""


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class TrainedBatch:
    """A version trained on rows of older versions, with and without the replay."""

    def __init__(self, folder: Path, store: SnapshotClient) -> None:
        self.folder = build("Qwen3-MoE", folder / "model")
        policy = load(self.folder)
        self.plain = {}
        for version in range(NOW + 1):
            if version:
                perturb(policy, by=0.05, seed=version)
            store.put("test", Version(version), raw_tensors(named_weights(policy)), canaries(policy), writer=1)
            self.plain[version] = load(self.folder)
            self.plain[version].load_state_dict(policy.state_dict())
        self.store = store

    def train(self, rows: list[Row], *, replay: bool) -> StepResult:
        policy = load(self.folder)
        policy.load_state_dict(self.plain[NOW].state_dict())
        source = SnapshotSource(policy, self.store, CPU, max_tokens=64, loaded=lambda _: None, record_routes=replay)
        return train(
            TrainablePolicy(policy, OptimizerConfig(lr=1e-3)), source, ProcessGroup(), [rows], NOW,
            config=a_learner(discrepancy=UNCORRECTED, micro_batch_tokens=64),
        )  # fmt: skip

    def routes(self, version: int, row: Row, stop: int) -> np.ndarray:
        """The version's own choice in a plain pass over the first tokens: [stop, layers, experts of a token]."""
        seen: list[torch.Tensor] = []
        model = self.plain[version]
        hooks = [
            module.register_forward_hook(lambda _, __, output: seen.append(output[2]))
            for module in model.modules()
            if type(module).__name__.endswith("TopKRouter")
        ]
        score(model, row.tokens[None, :stop].astype(np.int64), np.ones((1, 1), np.float32))
        for hook in hooks:
            hook.remove()
        return torch.stack(seen, dim=1).numpy().astype(np.int16)


@pytest.fixture
def trained(tmp_path: Path, store: SnapshotClient) -> TrainedBatch:
    return TrainedBatch(tmp_path, store)


def test_the_training_pass_replays_the_experts_of_each_tokens_version(trained: TrainedBatch) -> None:
    """Current log-probs are those of plain transformers with these experts. Without the replay they are not."""
    row = a_row("g/0", tokens(10, 1), OF_TWO)
    (replayed,), (free,) = (trained.train([row], replay=replay).micro_batches for replay in (True, False))
    assert replayed.batch.routes is not None
    expected = np.full_like(replayed.batch.routes[0], FREE)
    for version, stop in ((0, 5), (1, 10)):
        own = trained.routes(version, row, stop)
        for position in range(stop):
            if OF_POSITIONS[position] == version:
                expected[position] = own[position]
    assert np.array_equal(replayed.batch.routes[0], expected)
    with given_experts(trained.plain[NOW], expected[None]):
        current = score(trained.plain[NOW], row.tokens[None].astype(np.int64), np.ones((1, 1), np.float32))
    own = replayed.batch.mask
    assert np.array_equal(replayed.current.numpy()[own], current[own])
    assert (free.current.numpy()[own] != current[own]).mean() > 0.5
    assert torch.equal(free.anchor.logprobs, replayed.anchor.logprobs), "the old log-probs are the same"


def test_tokens_of_the_present_version_alone_change_nothing(trained: TrainedBatch) -> None:
    rows = [a_row(f"g/{i}", tokens(8, i), [-1, *[NOW] * 7]) for i in range(2)]
    replayed, free = (trained.train(rows, replay=replay) for replay in (True, False))
    assert replayed.micro_batches[0].batch.routes is None
    assert torch.equal(replayed.micro_batches[0].current, free.micro_batches[0].current)
    assert replayed.grad_norm == free.grad_norm


def test_unchanged_weights_make_the_ratio_one(trained: TrainedBatch) -> None:
    """The weights of version 0, under the number of a later version: each ratio is 1 to the bit."""
    trained.plain[NOW].load_state_dict(trained.plain[0].state_dict())
    rows = [a_row(f"g/{i}", tokens(9, i), [-1, *[0] * 8]) for i in range(2)]
    (one,) = trained.train(rows, replay=True).micro_batches
    assert one.batch.routes is not None
    assert torch.equal(one.current, one.anchor.logprobs)


@pytest.mark.parametrize(
    "proximal", [{"kind": "replica"}, {"kind": "current_recompute"}, {"kind": "snapshot", "prefetch": True}]
)
def test_routes_that_do_not_record_are_refused(proximal: dict[str, object]) -> None:
    with pytest.raises(ValueError, match='routing_replay = "learner" records the experts in the passes'):
        LearnerConfig.model_validate({"versions": 1, "routing_replay": "learner", "proximal": proximal})
