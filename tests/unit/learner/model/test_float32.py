"""A float32 forward pass with a bfloat16 model."""

from pathlib import Path

import pytest
import torch

from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.policy import token_logprobs
from tests.learner_parts.models import load

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])


@pytest.fixture(params=["starting_model", "untied_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@torch.no_grad()
def test_values_are_those_of_a_float32_copy(folder: Path) -> None:
    model, copy = load(folder), load(folder).float()
    before = model(input_ids=TOKENS).logits
    with float32_forward(model):
        inside = model(input_ids=TOKENS).logits
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, copy(input_ids=TOKENS).logits, atol=1e-5)
    assert not torch.equal(inside, before.float())
    assert torch.equal(model(input_ids=TOKENS).logits, before), "the model is as it was"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_failed_pass_leaves_the_parameters(starting_model: Path) -> None:
    model = load(starting_model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(IndexError), float32_forward(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_log_probs_inside_are_those_of_a_float32_copy(folder: Path) -> None:
    """The head of `token_logprobs` is not called as a module: it takes the type of the hidden states."""
    model, copy = load(folder), load(folder).float()
    ones = torch.ones(2, 1)
    low = token_logprobs(model, TOKENS, ones)
    with float32_forward(model):
        inside = token_logprobs(model, TOKENS, ones)
    assert torch.allclose(inside, token_logprobs(copy, TOKENS, ones), atol=1e-5)
    assert not torch.equal(inside, low)
