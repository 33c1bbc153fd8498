"""Log-probs without an array of [tokens, vocabulary]: values, gradients, bits and memory."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest import rescore
from palimpsest.services.learner.model import logprobs
from palimpsest.services.learner.model.logprobs import Positions, chunked_logprobs
from palimpsest.services.learner.model.output_head import LinearHead, ModelHead, Transform, find_head
from palimpsest.services.learner.model.policy import CHUNK_ATTRIBUTE, token_logprobs, token_logprobs_and_entropy

TRANSFORMS = [Transform(), Transform("divide", 3.0), Transform("multiply", 0.5), Transform("softcap", 2.0)]
FAMILIES: list[tuple[str, dict[str, Any], Transform]] = [
    ("qwen3", {}, Transform()),
    ("qwen3", {"tie_word_embeddings": True}, Transform()),
    ("qwen3_moe", {}, Transform()),
    ("gemma2", {"final_logit_softcapping": 30.0}, Transform("softcap", 30.0)),
    ("granite", {"logits_scaling": 8.0}, Transform("divide", 8.0)),
    ("hyperclovax", {"logits_scaling": 0.5}, Transform("multiply", 0.5)),
    ("cohere", {"logit_scale": 0.0625}, Transform("multiply", 0.0625)),
    ("falcon_h1", {"lm_head_multiplier": 0.25}, Transform("multiply", 0.25)),
]
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROWS = torch.tensor([[5, 40, 90, 7, 96, 33, 2], [9, 40, 17, 8, 0, 0, 0]])
TEMPERATURES = torch.tensor([[1.0], [0.7]])


def a_model(family: str, settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SMALL | settings)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval()


def oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, positions: Positions
) -> tuple[Tensor, Tensor]:
    """All logits at once, in float64, by autograd."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    match transform.kind:
        case "divide":
            logits = logits / transform.value
        case "multiply":
            logits = logits * transform.value
        case "softcap":
            logits = transform.value * torch.tanh(logits / transform.value)
    every = (logits / positions.temperatures.to(logits.dtype)).log_softmax(-1)
    chosen = every.gather(-1, positions.targets[:, None])[:, 0]
    finite = torch.isfinite(every)
    entropy = -torch.where(finite, every.exp() * torch.where(finite, every, 0.0), 0.0).sum(-1)
    return torch.where(positions.wanted, chosen, 0.0), torch.where(positions.wanted, entropy, 0.0)


def a_problem(
    tokens: int, vocabulary: int, seed: int, *, dtype: torch.dtype = torch.float32, share: float = 0.7
) -> tuple[list[Tensor], Positions, Tensor]:
    """Hidden states, weight and bias; positions; and the derivatives of a loss by log-prob and entropy."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(tokens, 6, generator=g), torch.randn(vocabulary, 6, generator=g)]
    parts.append(torch.randn(vocabulary, generator=g))
    temperatures = 0.5 + torch.rand(tokens, 1, generator=g)
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    wanted = torch.rand(tokens, generator=g) < share
    return (
        [part.to(dtype) for part in parts],
        Positions(targets, temperatures, wanted, scaled=True),
        torch.randn(2, tokens, generator=g),
    )


def gradients(values: tuple[Tensor, Tensor], factors: Tensor, leaves: list[Tensor], *, entropy: bool) -> list[Tensor]:
    loss = (values[0] * factors[0]).sum() + ((values[1] * factors[1]).sum() if entropy else 0.0)
    return list(torch.autograd.grad(loss, leaves))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "NARROWEST_TILE", 3)
    monkeypatch.setattr(logprobs, "BLOCK_ENTRIES", {"cpu": 40})


@pytest.mark.usefixtures("small_tiles")
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 23), vocabulary=st.integers(2, 40), chunk=st.integers(1, 30), seed=st.integers(0, 9999),
    transform=st.sampled_from(TRANSFORMS), biased=st.booleans(), entropy=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_full_logits(
    tokens: int, vocabulary: int, chunk: int, seed: int, transform: Transform, biased: bool, entropy: bool, share: float
) -> None:
    """Against float64 and autograd: any shape, chunks that do not divide the tokens, any share of wanted tokens."""
    parts, positions, factors = a_problem(tokens, vocabulary, seed, share=share)
    leaves = [part.requires_grad_() for part in (parts if biased else parts[:2])]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    head = LinearHead(leaves[1], leaves[2] if biased else None, transform)
    values = chunked_logprobs(head, leaves[0], positions, chunk, entropy=entropy)
    expected = oracle(exact[0], exact[1], exact[2] if biased else None, transform, positions)
    assert torch.allclose(values[0].double(), expected[0], atol=1e-5)
    assert torch.allclose(values[1].double(), expected[1] if entropy else torch.zeros(()).double(), atol=1e-5)
    got = gradients(values, factors, leaves, entropy=entropy)
    for own, other in zip(got, gradients(expected, factors, exact, entropy=entropy), strict=True):
        assert torch.allclose(own.double(), other, atol=3e-5)


@pytest.mark.usefixtures("small_tiles")
def test_bf16_gradients_are_within_the_rounding_of_the_full_logits() -> None:
    """Relative to float64: no more than 1.5 times the error of autograd through all bf16 logits."""
    parts, positions, factors = a_problem(64, 50, 3, dtype=torch.bfloat16)
    leaves, whole = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    exact = [part.double().requires_grad_() for part in parts]
    own = gradients(
        chunked_logprobs(LinearHead(leaves[1], leaves[2], Transform()), leaves[0], positions, 16, entropy=True),
        factors, leaves, entropy=True,
    )  # fmt: skip
    full = torch.nn.functional.linear(*whole).float() / positions.temperatures
    every = full.log_softmax(-1)
    wanted = positions.wanted.float()
    both = every.gather(-1, positions.targets[:, None])[:, 0] * wanted, -(every.exp() * every).sum(-1) * wanted
    reference = gradients(both, factors, whole, entropy=True)
    expected = gradients(oracle(*exact, Transform(), positions), factors, exact, entropy=True)
    for mine, usual, right in zip(own, reference, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine - right).norm()) <= 1.5 * float((usual - right).norm()) + 1e-9
        assert float((mine - right).norm() / right.norm()) < 0.01


def test_no_positions_give_no_values_and_gradients_of_0() -> None:
    parts, positions, _ = a_problem(0, 7, 0)
    leaves = [part.requires_grad_() for part in parts]
    values = chunked_logprobs(LinearHead(leaves[1], leaves[2], Transform()), leaves[0], positions, 4, entropy=True)
    assert [len(each) for each in values] == [0, 0]
    assert all(not g.any() for g in torch.autograd.grad(values[0].sum() + values[1].sum(), leaves))


def test_a_logit_of_minus_infinity_leaves_entropy_and_gradients_finite() -> None:
    parts, positions, factors = a_problem(9, 7, 5)
    parts[2][3] = -torch.inf
    positions = positions._replace(targets=positions.targets.clamp(max=2))
    leaves = [part.requires_grad_() for part in parts]
    exact = [part.detach().double().requires_grad_() for part in parts]
    values = chunked_logprobs(LinearHead(leaves[1], leaves[2], Transform()), leaves[0], positions, 4, entropy=True)
    expected = oracle(*exact, Transform(), positions)
    assert torch.allclose(values[1].double(), expected[1], atol=1e-5)
    got, right = (gradients(v, factors, e, entropy=True) for v, e in ((values, leaves), (expected, exact)))
    for own, other in zip(got[:2], right[:2], strict=True):
        assert torch.allclose(own.double(), other, atol=3e-5)
    assert got[2][3] == 0.0
    impossible = positions._replace(targets=torch.full_like(positions.targets, 3))
    chosen, _ = chunked_logprobs(LinearHead(leaves[1], leaves[2], Transform()), leaves[0], impossible, 4, entropy=True)
    assert torch.equal(torch.isinf(chosen), impossible.wanted)


@pytest.mark.parametrize(("family", "settings", "transform"), FAMILIES)
def test_the_logits_of_each_family_are_its_own(family: str, settings: dict, transform: Transform) -> None:
    """A chunk of all positions: the same product as in the model's own forward pass, so the same bits."""
    model = a_model(family, settings)
    head = find_head(model)
    assert isinstance(head, LinearHead)
    assert head.transform == transform
    logits = model(input_ids=ROWS, use_cache=False).logits.float() / TEMPERATURES[:, :, None]
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ROWS[:, 1:, None])[..., 0]
    assert torch.equal(token_logprobs(model, ROWS, TEMPERATURES)[:, 1:], expected)


@pytest.mark.parametrize("own_code", [False, True])
@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_all_parameters_get_the_gradient_of_the_full_logits(
    settings: dict, own_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tied embeddings the head's gradient and the embedding's add up in one parameter."""
    model = a_model("gemma2", settings | {"final_logit_softcapping": 30.0}, torch.float32)
    setattr(model, CHUNK_ATTRIBUTE, 3)
    other = copy.deepcopy(model)
    if own_code:
        monkeypatch.setattr("palimpsest.services.learner.model.output_head._transforms", lambda model: iter(()))
        assert isinstance(find_head(model), ModelHead)
    scored, entropy = token_logprobs_and_entropy(model, ROWS, TEMPERATURES)
    (scored.sum() + 0.3 * entropy.sum()).backward()
    logits = other(input_ids=ROWS, use_cache=False).logits[:, :-1] / TEMPERATURES[:, :, None]
    every = logits.log_softmax(-1)
    (every.gather(-1, ROWS[:, 1:, None]).sum() - 0.3 * (every.exp() * every).sum()).backward()
    for (name, mine), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None, name
        assert torch.allclose(mine.grad, right.grad, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("own_code", [False, True])
def test_the_bits_of_a_token_depend_on_the_layout_only(own_code: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on gradients, entropy, or which other tokens are wanted."""
    if own_code:
        monkeypatch.setattr("palimpsest.services.learner.model.output_head._transforms", lambda model: iter(()))
    model = a_model("qwen3", {})
    setattr(model, CHUNK_ATTRIBUTE, 4)
    with_gradient = token_logprobs(model, ROWS, TEMPERATURES)
    wanted = torch.zeros_like(ROWS, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 2] = True
    with torch.no_grad():
        plain = token_logprobs(model, ROWS, TEMPERATURES)
        with_entropy, entropy = token_logprobs_and_entropy(model, ROWS, TEMPERATURES)
        few, few_entropies = token_logprobs_and_entropy(model, ROWS, TEMPERATURES, wanted=wanted)
    assert torch.equal(with_gradient, plain)
    assert torch.equal(with_entropy, plain)
    assert torch.equal(few, torch.where(wanted, plain, 0.0))
    assert torch.equal(few_entropies, torch.where(wanted, entropy, 0.0))


def test_a_model_that_cannot_run_without_its_decoder_is_scored_by_its_logits() -> None:
    model = a_model("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64})
    assert find_head(model) is None
    logits = model(input_ids=ROWS, use_cache=False).logits.float() / TEMPERATURES[:, :, None]
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ROWS[:, 1:, None])[..., 0]
    assert torch.equal(token_logprobs(model, ROWS, TEMPERATURES)[:, 1:], expected)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation returns, views and inputs left out."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("entropy", [False, True])
def test_no_array_has_more_entries_than_a_chunk_of_logits(entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens and 4,096 entries in chunks of 32: 131,072 entries at once, not 2,097,152."""
    monkeypatch.setattr(logprobs, "BLOCK_ENTRIES", {"cpu": 1 << 12})
    tokens, vocabulary, chunk = 512, 4096, 32
    parts, positions, factors = a_problem(tokens, vocabulary, 1)
    leaves = [part.requires_grad_() for part in parts]
    with Largest(iter(leaves)) as largest:
        head = LinearHead(leaves[1], leaves[2], Transform("softcap", 5.0))
        values = chunked_logprobs(head, leaves[0], positions, chunk, entropy=entropy)
        gradients(values, factors, leaves, entropy=entropy)
    assert largest.entries == chunk * vocabulary
    assert largest.entries > max(leaf.numel() for leaf in leaves)


@pytest.mark.parametrize(("family", "settings"), [(family, settings) for family, settings, _ in FAMILIES[:6]])
def test_rescore_computes_the_same_bits_by_other_code(family: str, settings: dict) -> None:
    """Chunks of 4 positions, which do not divide the 14 of the batch."""
    model = a_model(family, settings)
    setattr(model, CHUNK_ATTRIBUTE, 4)
    with torch.no_grad():
        own = token_logprobs(model, ROWS, TEMPERATURES)
    head: Any = model.get_output_embeddings()
    head.forward = rescore.in_chunks(head.forward, 4)
    assert torch.equal(torch.from_numpy(rescore.score(model, ROWS.numpy(), TEMPERATURES.numpy())), own)
