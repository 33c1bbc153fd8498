"""learner.activation_checkpointing: the same values and gradients, layers computed again."""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.output_head import find_head
from palimpsest.services.learner.model.policy import checkpoint_activations, token_logprobs
from tests.learner_parts.models import load

ROWS = torch.tensor([[5, 40, 120, 7, 260, 33], [9, 40, 17, 8, 0, 0]])


def test_values_and_gradients_are_equal_bit_for_bit(starting_model: Path) -> None:
    plain = load(starting_model)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    find_head(checkpointed)  # the first call runs the model, which the counts leave out
    layer = type(checkpointed.base_model.layers[0])
    with patch.object(layer, "forward", autospec=True, side_effect=layer.forward) as calls:
        values = token_logprobs(checkpointed, ROWS, torch.ones(2, 1))
        forward = calls.call_count
        values.sum().backward()
    assert calls.call_count == 2 * forward == 2 * len(checkpointed.base_model.layers)
    expected = token_logprobs(plain, ROWS, torch.ones(2, 1))
    expected.sum().backward()
    assert torch.equal(values, expected)
    for (name, mine), other in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


def test_every_second_layer_is_computed_again(starting_model: Path) -> None:
    plain = load(starting_model)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed, every=2)
    find_head(checkpointed)
    layers = checkpointed.base_model.layers
    layer = type(layers[0])
    with patch.object(layer, "forward", autospec=True, side_effect=layer.forward) as calls:
        values = token_logprobs(checkpointed, ROWS, torch.ones(2, 1))
        values.sum().backward()
    assert calls.call_count == len(layers) + len(layers[::2]) > len(layers)
    token_logprobs(plain, ROWS, torch.ones(2, 1)).sum().backward()
    for (name, mine), other in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


def test_dropout_in_a_layer_is_refused() -> None:
    config = AutoConfig.for_model(
        "opt", vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"learner\.activation_checkpointing: OPTForCausalLM computes other values"):
        checkpoint_activations(model)


def test_a_model_without_such_layers_is_refused(starting_model: Path) -> None:
    model = load(starting_model)
    with (
        patch.object(type(model), "supports_gradient_checkpointing", False),
        pytest.raises(UserError, match="does not support it; set it to false"),
    ):
        checkpoint_activations(model)
