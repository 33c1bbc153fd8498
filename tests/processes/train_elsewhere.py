"""Train a version with every recipe on another device, and compare it with the CPU's.

python -m tests.processes.train_elsewhere MODEL [CASE ...]
"""

import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.config.proximal import SnapshotProximal
from palimpsest.common.config.recipes import RECIPES, apply_recipe
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.manifest import TensorEntry
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import EditableModel, load_weights, named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.types import Source
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.training.results import StepResult
from tests.learner_parts.models import perturb, train
from tests.learner_parts.other_device import device
from tests.records.builders import a_learner, a_row

NOW = Version(4)
OTHERS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed", "activation_checkpointing": True},
    "one chunk of logits": {"logprob_chunk_tokens": 1024},
    "audit": {"proximal": {"kind": "bypass"}, "audit": {"fraction": 1.0}},
    "offload": {"offload": "optimizer"},
    "divergence in the reward": {
        "advantages": {"kind": "reinforce_pp"}, "loss": {"kl": {"weight": 0.1, "place": "reward"}}
    },
    "baseline": {"vcpo": {"baseline": True}, "loss": {"objective": "policy_gradient"}},
    "all rules": {
        "discrepancy": {
            "weight": "ratio", "band": 2.0, "tokens": [0.5, 2.0], "geometric": [0.5, 2.0], "sequence": [0.1, 10.0],
            "segment": [0.5, 2.0], "veto": 1e-4, "m2": 0.1, "weight_normalize": True,
        },
        "loss": {"entropy": 0.01, "epo": {"weight": 0.1}, "kl": {"weight": 0.1}, "opsm": 0.1},
    },
}  # fmt: skip
"""Keys of learner that no recipe sets."""


TOLERANCE = 0.05
"""Largest relative difference of the norm of the gradient: other kernels of the attention round otherwise in bf16."""


class OldVersion:
    """A shadow with one set of weights for every version. It needs no store."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.version: Version | None = None

    def load_version(self, version: Version) -> bool:
        """Keep the weights."""
        self.version = version
        return True

    def expect(self, version: Version) -> None:
        """Prepare nothing."""


def rows() -> list[Row]:
    """Rows of two turns with a tool's answer between them, of versions 1 to 4."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(8):
        length = 9 + i % 4
        tokens = torch.randint(3, 250, (length,), generator=generator).tolist()
        versions = [-1, -1, 1 + i % 4, 1 + i % 4, -1, -1] + [4] * (length - 6)
        behavior = (-5.4 - 0.3 * torch.rand(length, generator=generator)).tolist()
        made.append(a_row(f"g{i // 4}/{i % 4}", tokens, versions, behavior=behavior, advantage=(-1.0) ** i))
    return made


def loaded(folder: str, config: LearnerConfig, place: torch.device) -> torch.nn.Module:
    """Return the model on the device. A device that torch does not know moves tied weights apart."""
    model: Any = load_model(
        folder, place, "sdpa", logprob_chunk_tokens=config.logprob_chunk_tokens, layout=config.layout
    )
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def trained(folder: str, config: LearnerConfig, place: torch.device) -> StepResult:
    """Return the result of a version."""
    model, older = (loaded(folder, config, place) for _ in range(2))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3), offload=config.offload == "optimizer")
    ranks = ProcessGroup()
    ranks.device = place
    exact: Source = SnapshotSource(
        model, cast("SnapshotClient", None), place, max_tokens=config.micro_batch_tokens, loaded=lambda _: None,
        ranks=ranks, shadow=lambda: OldVersion(older),
    )  # fmt: skip
    source, state = exact, dict[str, Any]()
    if not isinstance(config.proximal, SnapshotProximal):
        surrogate = cast("Any", config.proximal)
        source = build_surrogate(surrogate, model=model, masters=policy.masters, device=place, max_staleness=4)
    if config.audit.fraction:
        state["auditor"] = exact
    if config.advantages.kind == "gae":
        state["critic"] = Critic(model, OptimizerConfig(lr=1e-3))
    if config.loss.kl.weight:
        state["start"] = older
    batch = rows()
    result = train(policy, source, ranks, [batch[:4], batch[4:]], NOW, config=config, multiplier=1.0, **state)
    Canaries(model, place, trajectories=2, micro_batch_tokens=64).made()
    return result


def cases() -> Iterator[tuple[str, LearnerConfig]]:
    """Yield each recipe, and OTHERS."""
    for name in RECIPES:
        yield name, a_learner(**apply_recipe(name, {}))
    for name, keys in OTHERS.items():
        yield name, a_learner(**keys)


def moved(folder: str, place: torch.device) -> None:
    """Carry weights to a model on the device as a base, and back by a change of one tensor. Raises ValueError."""
    cpu = torch.device("cpu")
    model, other = (loaded(folder, a_learner(), each) for each in (place, cpu))
    perturb(other, by=0.01, seed=3)
    load_weights(model, raw_tensors(named_weights(other)))
    first = next(raw_tensors(named_weights(loaded(folder, a_learner(), cpu))))
    entry = TensorEntry(first.name, first.dtype, first.shape, "", 0, 0)
    with EditableModel(model).editing(entry) as raw:
        raw[:] = first.raw
    expected = {tensor.name: tensor.raw for tensor in raw_tensors(named_weights(other))} | {first.name: first.raw}
    for tensor in raw_tensors(named_weights(model)):
        if not np.array_equal(tensor.raw, expected[tensor.name]):
            raise ValueError(tensor.name)


def fault(folder: str, config: LearnerConfig, elsewhere: torch.device) -> str:
    """Return what is wrong with a version trained on the device, or an empty text."""
    try:
        norms = [trained(folder, config, place).grad_norm for place in (torch.device("cpu"), elsewhere)]
    except Exception:  # the next case is tried, too
        return traceback.format_exc()
    if math.isclose(*norms, rel_tol=TOLERANCE) or all(map(math.isnan, norms)):  # no step: all was masked
        return ""
    return f"norms of the gradient: {norms}"


def main(folder: str, names: Sequence[str]) -> int:
    """Print what fails. Return 1 if anything does."""
    torch.set_num_threads(1)
    elsewhere = device()
    moved(folder, elsewhere)
    chosen = [(name, config) for name, config in cases() if not names or name in names]
    faults = {name: text for name, config in chosen if (text := fault(folder, config, elsewhere))}
    print(*(f"{name}: {text}" for name, text in faults.items()), f"{len(chosen)} cases", sep="\n")
    return 1 if faults or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
