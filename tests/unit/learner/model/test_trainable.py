"""The model in training computes with the weights that it publishes."""

import shutil
from pathlib import Path

import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.policy import load_model, token_logprobs, token_logprobs_and_entropy
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import load_weights, named_weights, raw_tensors
from tests.learner_parts.models import CPU, load, logprobs, perturb


def test_18_10_a_log_prob_belongs_to_the_token_at_its_index(starting_model: Path) -> None:
    """algorithms.md 18.10: the value at index t is the prediction of token t only."""
    model = load(starting_model)
    row = [5, 40, 120, 7, 260]
    scored, entropy = token_logprobs_and_entropy(model, torch.tensor([row]), torch.ones(1, 1))
    assert scored[0].tolist() == pytest.approx([0.0, *logprobs(model, row)], abs=1e-6)
    assert entropy[0, 0].item() == 0.0
    changed = token_logprobs(model, torch.tensor([[*row[:3], 9, 260]]), torch.ones(1, 1))
    assert torch.equal(changed[0, :3], scored[0, :3])
    assert not torch.equal(changed[0, 3:], scored[0, 3:])


def test_18_9_the_temperature_divides_the_logits(starting_model: Path) -> None:
    """algorithms.md 18.9."""
    model = load(starting_model)
    row = torch.tensor([[5, 40, 120], [5, 40, 120]])
    scored, entropy = token_logprobs_and_entropy(model, row, torch.tensor([[1.0], [0.5]]))
    logits = model(input_ids=row[:1]).logits[0, :2].float()
    for i, temperature in enumerate((1.0, 0.5)):
        explicit = (logits / temperature).softmax(-1)
        assert scored[i, 1:].tolist() == pytest.approx([explicit[0, 40].log().item(), explicit[1, 120].log().item()])
        assert entropy[i, 1].item() == pytest.approx(-(explicit[0] * explicit[0].log()).sum().item(), rel=1e-5)


def test_padding_on_the_right_changes_nothing_before_it(starting_model: Path) -> None:
    model = load(starting_model)
    short = token_logprobs(model, torch.tensor([[5, 40, 120]]), torch.ones(1, 1))
    padded = token_logprobs(model, torch.tensor([[5, 40, 120, 0, 0]]), torch.ones(1, 1))
    assert padded[0, :3].tolist() == pytest.approx(short[0].tolist(), abs=2e-3)


@pytest.mark.parametrize("kind", ["starting_model", "untied_model"])
def test_weights_are_exported_once_each_and_loaded_bit_for_bit(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    model, other = load(folder), load(folder)
    perturb(model, by=0.1, seed=1)
    assert ("lm_head.weight" in named_weights(model)) is (kind == "untied_model")
    load_weights(other, raw_tensors(named_weights(model)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_missing_or_unknown_tensor_is_refused(starting_model: Path, untied_model: Path) -> None:
    tied, untied = load(starting_model), load(untied_model)
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        load_weights(untied, raw_tensors(named_weights(tied)))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_weights(tied, raw_tensors(named_weights(untied)))


def test_a_step_updates_the_master_weights_and_casts_them_into_the_model(starting_model: Path) -> None:
    """One AdamW step from zero moments moves every weight by lr against its gradient's sign."""
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3, max_grad_norm=1e9))
    before = [master.clone() for master in policy.masters]
    for gradient in policy.gradients():
        gradient.fill_(2.0)
    policy.step()
    for master, start, computing in zip(policy.masters, before, model.parameters(), strict=True):
        assert torch.allclose(start - master, torch.full_like(master, 1e-3), atol=1e-6)
        assert torch.equal(computing, master.to(torch.bfloat16))
    assert all(float(gradient.abs().max()) == 0.0 for gradient in policy.gradients())


def test_master_weights_keep_updates_below_bf16_precision(starting_model: Path) -> None:
    """At lr 1e-6 one step is below half a bf16 unit for most weights; a hundred steps are above it."""
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-6))
    start = next(model.parameters()).detach().clone()
    for _ in range(100):
        for gradient in policy.gradients():
            gradient.fill_(1.0)
        policy.step()
    moved = (policy.masters[0] - start.float()).mean()
    assert float(moved) == pytest.approx(-1e-4, rel=0.05)


def test_gradients_of_micro_batches_add_up_in_float32(starting_model: Path) -> None:
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig())
    for _ in range(3):
        scored = token_logprobs(model, torch.tensor([[5, 40, 120, 7]]), torch.ones(1, 1))
        scored.sum().backward()
    once = [gradient.clone() / 3 for gradient in policy.gradients()]
    assert all(p.grad is None for p in model.parameters())
    for gradient in policy.gradients():
        gradient.zero_()
    scored = token_logprobs(model, torch.tensor([[5, 40, 120, 7]]), torch.ones(1, 1))
    scored.sum().backward()
    for got, single in zip(once, policy.gradients(), strict=True):
        assert torch.allclose(got, single, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(starting_model: Path, bad: float) -> None:
    policy = TrainablePolicy(load(starting_model), OptimizerConfig(lr=1e-3))
    before = [master.clone() for master in policy.masters]
    policy.gradients()[3].fill_(bad)
    norm = policy.step()
    assert not (norm < float("inf"))
    assert policy.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.masters, strict=True))
    policy.gradients()[3].fill_(1.0)  # the next finite gradient updates the weights
    policy.step()
    assert policy.steps == 1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({}, [1.0] * 8),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup": 2, "decay": 6, "end_share": 0.2}, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]),
        ({"decay": 4, "end_share": 0.0}, [0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(starting_model: Path, schedule: dict, rates: list[float]) -> None:
    policy = TrainablePolicy(load(starting_model), OptimizerConfig(lr=1.0, **schedule))
    used = []
    for _ in rates:
        used.append(policy.learning_rate)
        policy.steps += 1
    assert used == pytest.approx(rates)


def test_a_decay_that_ends_before_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay \(3\) must be greater than warmup \(4\)"):
        OptimizerConfig(warmup=4, decay=3)


def test_a_restored_policy_continues_bit_for_bit(starting_model: Path) -> None:
    def steps(policy: TrainablePolicy, count: int) -> None:
        for i in range(count):
            for k, gradient in enumerate(policy.gradients()):
                gradient.copy_(torch.sin(torch.arange(gradient.numel()) + 7.0 * i + k).view_as(gradient))
            policy.step()

    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup=5)
    straight = TrainablePolicy(load(starting_model), config)
    steps(straight, 3)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    other = TrainablePolicy(load(starting_model), config)
    other.restore(state, straight.steps)
    steps(straight, 2)
    steps(other, 2)
    for name, tensor in straight.state().items():
        assert torch.equal(other.state()[name], tensor), name
    for a, b in zip(straight.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_model_is_refused(starting_model: Path, untied_model: Path) -> None:
    policy = TrainablePolicy(load(starting_model), OptimizerConfig())
    with pytest.raises(ValueError, match=r"checkpoint has \d+ parameters"):
        policy.restore(TrainablePolicy(load(untied_model), OptimizerConfig()).state(), 1)


@pytest.mark.parametrize(
    ("path", "says"),
    [("nowhere/at/all", "does not exist"), ("./nothing", "does not exist")],
)
def test_a_missing_model_is_refused(path: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_model(path, CPU, "eager")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(UserError, match="is not a causal language model that can be loaded"):
        load_model(str(tmp_path), CPU, "eager")


def test_truncated_weights_are_refused(tmp_path: Path, starting_model: Path) -> None:
    shutil.copytree(starting_model, tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    with pytest.raises(UserError, match=r"is not a causal language model that can be loaded \(.*\): a complete model"):
        load_model(str(tmp_path / "model"), CPU, "eager")


def test_weights_that_cannot_be_read_are_named(tmp_path: Path, starting_model: Path) -> None:
    weights = shutil.copytree(starting_model, tmp_path / "model") / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"user \d+ cannot read {weights}: let every user read"):
        load_model(str(tmp_path / "model"), CPU, "eager")


@pytest.mark.parametrize(
    ("config", "says"), [(None, "holds no model"), ("{", "cannot be read"), ("[1, 2", "cannot be read")]
)
def test_an_unusable_config_is_refused(tmp_path: Path, config: str | None, says: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=rf"model\.path: .*{says}"):
        load_model(str(tmp_path), CPU, "eager")
