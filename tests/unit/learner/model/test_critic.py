"""The value model: which state a value belongs to, training, and resuming from a checkpoint."""

from pathlib import Path

import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.packing import PackedRows
from palimpsest.services.learner.model.policy import load_model, token_logprobs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from tests.learner_parts.models import CPU, load

pytestmark = pytest.mark.thorough

ROWS = torch.tensor([[5, 40, 120, 7, 260, 33], [9, 40, 17, 8, 0, 0]])
MASK = torch.tensor([[False, True, True, False, False, True], [False, True, True, True, False, False]])
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup=5)


def a_critic(folder: Path, config: OptimizerConfig = OPTIMIZER, *, head: float = 0.0) -> Critic:
    """A critic whose head has random weights with this standard deviation, so that values differ."""
    critic = Critic(load(folder), config)
    state = critic.state()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(".master") and tensor.shape[0] == 1 and tensor.ndim == 2:
            tensor.copy_(head * torch.randn(tensor.shape, generator=generator))
    critic.restore(state)
    return critic


def train(critic: Critic, returns: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        loss = critic.loss(ROWS, MASK, returns, critic.values(ROWS), clip=None, denominator=float(MASK.sum()))
        loss.backward()
        critic.step()


def test_a_new_critic_predicts_0_everywhere(starting_model: Path) -> None:
    values = Critic(load(starting_model), OPTIMIZER).values(ROWS)
    assert values.shape == ROWS.shape
    assert values.dtype == torch.float32
    assert not values.any()


def test_18_10_a_value_depends_on_the_tokens_before_its_token(starting_model: Path) -> None:
    """The value at index t depends on the tokens before t only."""
    critic = a_critic(starting_model, head=0.1)
    values = critic.values(ROWS)
    assert values[:, 0].tolist() == [0.0, 0.0]
    assert (values[:, 1:].abs() > 1e-4).all()
    changed = ROWS.clone()
    changed[0, 3] = 200
    again = critic.values(changed)
    assert torch.equal(again[0, :4], values[0, :4])
    assert (again[0, 4:] != values[0, 4:]).all()


def test_values_are_the_head_on_the_models_last_hidden_state(starting_model: Path, untied_model: Path) -> None:
    """Equal to the hidden state of plain transformers, shifted by one, with tied and untied vocabulary heads."""
    for folder in (starting_model, untied_model):
        critic = a_critic(folder, head=0.1)
        model = load(folder)
        with torch.no_grad():
            hidden = model(input_ids=ROWS, output_hidden_states=True, use_cache=False).hidden_states[-1]
        (weight,) = [m for m in critic.trainable.masters if m.shape == (1, hidden.shape[-1])]
        expected = (hidden.float() @ weight[0])[:, :-1]
        assert torch.allclose(critic.values(ROWS)[:, 1:], expected, rtol=1e-4, atol=1e-5)
        assert sum(m.numel() for m in critic.trainable.masters) == (
            sum(p.numel() for p in model.base_model.parameters()) + hidden.shape[-1] + 1
        )


def test_the_final_value_is_that_of_the_state_after_the_last_token(starting_model: Path) -> None:
    critic = a_critic(starting_model, head=0.5)
    tokens = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    found = critic.final_values(tokens, torch.tensor([5, 3]))
    for row, length in enumerate((5, 3)):
        extended = torch.cat([tokens[row, :length], torch.tensor([99])])[None]
        assert float(found[row]) == pytest.approx(float(critic.values(extended)[0, length]), rel=1e-2)
    assert found.unique().numel() == 2


def test_padding_on_the_right_changes_nothing_before_it(starting_model: Path) -> None:
    critic = a_critic(starting_model, head=0.1)
    short = critic.values(ROWS[1:, :4])
    assert critic.values(ROWS)[1, :4].tolist() == pytest.approx(short[0].tolist(), abs=2e-3)


def test_a_critic_of_packed_rows_gives_their_values(starting_model: Path) -> None:
    """Values, final values and gradients of a packed critic are those of a padded one, within bf16."""
    lengths = [len(ROWS[0]), len(ROWS[1]) - 2]
    rows, mask = PackedRows.of(lengths, ROWS.shape[1], CPU), MASK.clone()
    mask[1, lengths[1] :] = False
    found = []
    for layout in ("padded", "packed"):
        torch.manual_seed(0)
        critic = Critic(load_model(str(starting_model), CPU, "sdpa", layout=layout), OPTIMIZER)
        torch.nn.init.normal_(critic._valued.head.weight, std=0.1)
        with torch.no_grad():
            values = torch.where(mask, critic.values(ROWS, rows), 0.0)
        critic.loss(ROWS, mask, torch.ones(ROWS.shape), values, clip=None, denominator=1.0, rows=rows).backward()
        norm = float(torch.stack(torch._foreach_norm(critic.gradients())).norm())
        found.append((values, critic.final_values(ROWS, torch.tensor(lengths)), torch.tensor(norm)))
    for padded, packed in zip(*found, strict=True):
        assert torch.allclose(padded, packed, rtol=0.05, atol=0.02)
        assert bool(padded.any())


def test_training_the_critic_leaves_the_policy_unchanged(starting_model: Path) -> None:
    """The critic is a copy: it shares neither weights nor gradients, even while the policy accumulates gradients."""
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)
    before = token_logprobs(model, ROWS, torch.ones(2, 1))
    critic = Critic(model, OPTIMIZER)
    train(critic, torch.ones(ROWS.shape), 3)
    assert not any(gradient.any() for gradient in policy.gradients())
    after = token_logprobs(model, ROWS, torch.ones(2, 1))
    assert torch.equal(before, after)


def test_the_critic_learns_a_constant_return(starting_model: Path) -> None:
    critic = Critic(load(starting_model), OptimizerConfig(lr=1e-2))
    train(critic, torch.full(ROWS.shape, 0.7), 60)
    assert critic.values(ROWS)[MASK].tolist() == pytest.approx([0.7] * int(MASK.sum()), abs=0.05)


def test_the_critic_learns_to_tell_trajectories_apart(starting_model: Path) -> None:
    """This needs more than the bias of the head: the decoder's weights learn too."""
    critic = Critic(load(starting_model), OptimizerConfig(lr=3e-3))
    returns = torch.tensor([[1.0], [-1.0]]).expand(ROWS.shape)
    decoder = critic.trainable.masters[0].clone()
    train(critic, returns, 80)
    values = critic.values(ROWS)
    assert values[0][MASK[0]].tolist() == pytest.approx([1.0] * 3, abs=0.2)
    assert values[1][MASK[1]].tolist() == pytest.approx([-1.0] * 3, abs=0.2)
    assert not torch.equal(critic.trainable.masters[0], decoder)


def test_18_12_splitting_into_micro_batches_leaves_the_gradient_unchanged(starting_model: Path) -> None:
    returns = torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(1))
    denominator = float(MASK.sum())

    def gradient(pieces: list[slice]) -> list[torch.Tensor]:
        model = load(starting_model).float()  # in float32, only the split can change the gradient
        critic = Critic(model, OPTIMIZER)
        with torch.no_grad():
            critic._valued.head.weight.fill_(0.01)
        for piece in pieces:
            before = critic.values(ROWS[piece])
            critic.loss(ROWS[piece], MASK[piece], returns[piece], before, clip=0.2, denominator=denominator).backward()
        return [g.clone() for g in critic.gradients()]

    whole, split = gradient([slice(0, 2)]), gradient([slice(0, 1), slice(1, 2)])
    assert any(g.any() for g in whole)
    for a, b in zip(whole, split, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_values_clipped_beyond_their_range_have_no_gradient(starting_model: Path) -> None:
    """All values moved up by .5 from the old ones, toward a return 10 above, so the constant clipped loss applies."""
    critic = a_critic(starting_model, head=0.1)
    values = critic.values(ROWS)
    returns = values + 10.0
    loss = critic.loss(ROWS, MASK, returns, values - 0.5, clip=0.2, denominator=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * 10.3**2 * 6, rel=1e-5)
    assert not any(g.any() for g in critic.gradients())
    critic.loss(ROWS, MASK, returns, values - 0.5, clip=None, denominator=1.0).backward()
    assert any(g.any() for g in critic.gradients())


def test_a_loss_that_is_not_finite_changes_nothing(starting_model: Path) -> None:
    critic = Critic(load(starting_model), OPTIMIZER)
    before = {name: tensor.clone() for name, tensor in critic.state().items()}
    train(critic, torch.full(ROWS.shape, float("nan")), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state().items())
    train(critic, torch.ones(ROWS.shape), 1)
    assert critic.trainable.steps == 1


def test_a_restored_critic_continues_bit_for_bit(starting_model: Path) -> None:
    returns = torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(2))
    straight = Critic(load(starting_model), OPTIMIZER)
    train(straight, returns, 3)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    other = Critic(load(starting_model), OPTIMIZER)
    other.restore(state)
    assert torch.equal(other.values(ROWS), straight.values(ROWS))
    train(straight, returns, 2)
    train(other, returns, 2)
    assert other.trainable.steps == 5
    assert torch.equal(other.values(ROWS), straight.values(ROWS))
    for name, tensor in straight.state().items():
        assert torch.equal(other.state()[name], tensor), name


def test_a_checkpoint_of_another_model_is_refused(starting_model: Path) -> None:
    critic = Critic(load(starting_model), OPTIMIZER)
    with pytest.raises(ValueError, match="it is not a critic's state"):
        critic.restore(critic.trainable.state())
    state = critic.state()
    del state["0.master"], state["0.exp_avg"], state["0.exp_avg_sq"]
    with pytest.raises(ValueError, match=r"checkpoint has \d+ parameters"):
        critic.restore(state)
