"""The policy of a new run has the adapter of learner.lora.start. A resumed run takes it from the checkpoint alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.common.base_model import own_adapter
from palimpsest.common.config import load as load_config
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.adapter import BASE_DIGEST, peft_config
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import adapter_weights
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.build_policy import build_policy
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.adapters import LORA, adapted, own_adapter as tensors_of
from tests.learner_parts.models import CPU
from tests.records.stored_runs import a_run


@pytest.fixture
def config(starting_model: Path, tmp_path: Path) -> RunConfig:
    """A run with a KL divergence that begins with the adapter of seed 3."""
    run, folder = a_run(tmp_path / "second", starting_model) / "run.toml", tmp_path / "adapter"
    flags = (f"rank={LORA.rank}", f"alpha={LORA.alpha}", f"targets={json.dumps(LORA.targets)}", f"start={folder}")
    named = [str(run), "--learner.loss.kl.weight=0.1", *(f"--learner.lora.{flag}" for flag in flags)]
    config = load_config(named, {}, program="").config
    folder.mkdir()
    adapter = own_adapter(config)
    assert adapter is not None
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(adapter, str(starting_model))))
    tensors = {name: tensor.clone() for name, tensor in tensors_of(adapted(starting_model, seed=3)).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {BASE_DIGEST: adapter.base})
    return config


def built(config: RunConfig, store: SnapshotClient) -> tuple[TrainablePolicy, TrainingState]:
    ranks, adapter = ProcessGroup(), own_adapter(config)
    policy = build_policy(config, ranks, store, adapter)
    loaded = build_training_state(config.learner, policy, store, CPU, on_load=lambda _: None, adapter=adapter)
    return policy, loaded


def check(model: torch.nn.Module | None, expected: torch.nn.Module) -> None:
    assert model is not None
    weights = adapter_weights(model)
    assert weights is not None
    assert weights.keys() == tensors_of(expected).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors_of(expected).items())


def test_a_new_run_begins_with_the_adapter(config: RunConfig, store: SnapshotClient, starting_model: Path) -> None:
    policy, state = built(config, store)
    check(policy.model, adapted(starting_model, seed=3))
    check(state.start, adapted(starting_model, seed=3))
    for master, tensor in zip(policy.masters, tensors_of(adapted(starting_model, seed=3)).values(), strict=True):
        assert torch.equal(master, tensor.float())


def test_the_other_ranks_do_not_read_the_folder(
    config: RunConfig, store: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.learner.lora.start is not None
    config.learner.lora.start.rename(config.learner.lora.start.with_name("moved"))
    monkeypatch.setenv("RANK", "1")
    policy, _ = built(config, store)
    assert not any(tensor.any() for name, tensor in tensors_of(policy.model).items() if ".lora_B." in name)


def test_a_resumed_run_does_not_read_the_folder(config: RunConfig, store: SnapshotClient, starting_model: Path) -> None:
    """The KL divergence is still measured from the adapter of version 0. The other ranks take over the same state."""
    policy, state = built(config, store)
    with torch.no_grad():
        for master in policy.masters:
            master.add_(1.0)
    saved = {name: tensor.clone() for name, tensor in (policy.state() | state.state()).items()}
    assert config.learner.lora.start is not None
    config.learner.lora.start.rename(config.learner.lora.start.with_name("moved"))
    with pytest.raises(UserError, match=r"learner.lora.start: .* holds no adapter"):
        built(config, store)
    writer = Writer(store)
    writer.begin()
    writer.commit(Version(0), "d" * 64)
    again, restored = built(config, store)
    again.restore({name: saved[name] for name in again.state()}, 0)
    restored.restore({name: saved[name] for name in saved if name not in again.state()})
    check(restored.start, adapted(starting_model, seed=3))
    assert all(torch.equal(*pair) for pair in zip(again.masters, policy.masters, strict=True))
