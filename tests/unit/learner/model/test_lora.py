"""A model with a low-rank adapter computes what peft computes, trains the adapter only, and shares its base."""

from pathlib import Path

import pytest
import torch
from blake3 import blake3

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.lora import add_adapter, copy_trained
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model, score_batch, token_logprobs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import load_weights, named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from tests.learner_parts.adapters import ADAPTER, LORA, adapted, by_peft, own_adapter, renew
from tests.learner_parts.models import CPU, canaries, load
from tests.records.builders import a_row

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])
ONE = torch.ones(2, 1)


def base_digest(model: torch.nn.Module) -> str:
    """Digest of everything but the adapter."""
    hasher = blake3()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


@torch.no_grad()
def test_a_new_adapter_changes_nothing(starting_model: Path) -> None:
    plain, model = load(starting_model), load(starting_model)
    add_adapter(model, LORA)
    assert torch.equal(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_log_probs_are_those_of_peft(starting_model: Path, tmp_path: Path) -> None:
    model = adapted(starting_model)
    oracle = by_peft(starting_model, own_adapter(model), tmp_path / "adapter")
    logits = oracle(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, logits)
    assert not torch.equal(load(starting_model)(input_ids=TOKENS).logits, logits)
    exact = logits[:, :-1].float().log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert torch.allclose(token_logprobs(model, TOKENS, ONE)[:, 1:], exact, atol=1e-6)


def test_only_the_adapter_is_trained_and_stored(starting_model: Path) -> None:
    model = adapted(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=0.1))
    before, base = {name: each.clone() for name, each in own_adapter(model).items()}, base_digest(model)
    token_logprobs(model, TOKENS, ONE).sum().backward()  # type: ignore[no-untyped-call]
    policy.step()
    assert base_digest(model) == base
    assert all(not torch.equal(each, before[name]) for name, each in own_adapter(model).items())
    assert named_weights(model).keys() == before.keys()
    assert [master.shape for master in policy.masters] == [each.shape for each in before.values()]
    for master, each in zip(policy.masters, own_adapter(model).values(), strict=True):
        assert torch.equal(master.to(torch.bfloat16), each), "what computes is the cast of the masters"


@torch.no_grad()
def test_a_copy_shares_the_base_and_has_an_adapter_of_its_own(starting_model: Path) -> None:
    model = adapted(starting_model)
    other = copy_trained(model)
    own, copied = model.state_dict(), other.state_dict()
    for name, tensor in own.items():
        assert (tensor.data_ptr() == copied[name].data_ptr()) == (".lora_" not in name), name
    before = model(input_ids=TOKENS).logits
    renew(other, seed=9)
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    assert not torch.equal(other(input_ids=TOKENS).logits, before)


@torch.no_grad()
def test_a_float32_pass_has_the_values_of_a_float32_copy(starting_model: Path) -> None:
    model = adapted(starting_model)
    before = model(input_ids=TOKENS).logits
    with float32_forward(model):
        inside = model(input_ids=TOKENS).logits
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, adapted(starting_model).float()(input_ids=TOKENS).logits, atol=1e-5)
    assert torch.equal(model(input_ids=TOKENS).logits, before), "the model is as it was"


@torch.no_grad()
def test_an_old_log_prob_is_that_of_a_fresh_model_with_the_old_adapter(
    starting_model: Path, store: SnapshotClient
) -> None:
    model, weights = adapted(starting_model), []
    for version in range(3):
        renew(model, seed=version)
        stored = list(raw_tensors({n: t.clone() for n, t in named_weights(model).items()}))
        store.put("test", Version(version), stored, canaries(model), writer=1, adapter=ADAPTER)
        weights.append(stored)
    base = base_digest(model)
    source = SnapshotSource(model, store, CPU, max_tokens=1000, loaded=lambda _: None, adapter=ADAPTER)
    rows = [a_row(f"row {v}", [7, 8, 9, 10, 11, 12], [-1, *[v] * 5]) for v in (1, 0)]
    (scored,) = source.proximal([pad(rows)], Version(2)).logprobs
    for i, version in enumerate((1, 0)):
        fresh = adapted(starting_model, seed=50)
        load_weights(fresh, weights[version])
        alone = torch.from_numpy(pad(rows[i : i + 1]).tokens)
        assert torch.equal(scored[i], token_logprobs(fresh, alone, torch.ones(1, 1))[0])
    assert base_digest(model) == base
    assert source._shadow is not None
    for name, tensor in source._shadow.model.state_dict().items():
        assert (tensor.data_ptr() == model.state_dict()[name].data_ptr()) == (".lora_" not in name), name


@torch.no_grad()
def test_packed_rows_have_the_log_probs_of_each_row_alone(starting_model: Path) -> None:
    """In float32: a processor may sum another number of rows in another order."""
    model, lengths = adapted(starting_model, packed=True), (40, 7, 23, 1, 64)
    made = [
        a_row(f"r{i}", [(3 + 7 * i + 5 * t) % 240 for t in range(n)], [-1] + [0] * (n - 1))
        for i, n in enumerate(lengths)
    ]
    plain = load_model(str(starting_model), CPU, "sdpa")
    add_adapter(plain, LORA)
    load_weights(plain, raw_tensors(named_weights(model)))
    together = score_batch(model.float(), pad(made), CPU)
    plain.float()
    for i, row in enumerate(made):
        assert torch.allclose(together[i, : lengths[i]], score_batch(plain, pad([row]), CPU)[0], rtol=0, atol=1e-4)


def test_a_packed_training_pass_gives_the_gradients_of_padded_rows(starting_model: Path) -> None:
    """In float32, where the rounding of bf16 does not hide a difference."""
    made = [a_row(f"r{n}", list(range(5, 5 + n)), [-1] + [0] * (n - 1)) for n in (20, 3, 9)]
    gradients = []
    for packed in (True, False):
        model = adapted(starting_model, packed=packed).float()
        score_batch(model, pad(made), CPU).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for own, expected in zip(*gradients, strict=True):
        assert own is not None
        assert expected is not None
        assert torch.allclose(own, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_an_old_version_of_another_base_is_refused(starting_model: Path, store: SnapshotClient) -> None:
    model = adapted(starting_model)
    stored = list(raw_tensors(named_weights(model)))
    store.put("test", Version(0), stored, canaries(model), writer=1, adapter=ADAPTER)
    other = type(ADAPTER)("another", ADAPTER.rank, ADAPTER.alpha, ADAPTER.targets)
    source = SnapshotSource(model, store, CPU, max_tokens=1000, loaded=lambda _: None, adapter=other)
    with pytest.raises(UserError, match="version 0 belongs to another base model"):
        source.proximal([pad([a_row("row", [7, 8, 9], [-1, 0, 0])])], Version(1))


@torch.no_grad()
def test_an_average_is_of_the_adapter_on_the_same_base(starting_model: Path) -> None:
    model = adapted(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig())
    source, first = EwmaProx(model, policy.masters, CPU, decay=0.5), [m.clone() for m in policy.masters]
    for master, second in zip(policy.masters, own_adapter(adapted(starting_model, seed=1)).values(), strict=True):
        master.copy_(second)
    source.published(policy.masters, active_share=1.0, mean_staleness=1.0)
    fresh, base = adapted(starting_model, seed=50), base_digest(model)
    means = [one.lerp(two, 1 / 1.5) for one, two in zip(first, policy.masters, strict=True)]
    for tensor, mean in zip(own_adapter(fresh).values(), means, strict=True):
        tensor.copy_(mean)
    batch = pad([a_row("row", [7, 8, 9, 10, 11, 12], [-1, *[0] * 5])])
    (scored,) = source.proximal([batch], Version(1)).logprobs
    assert torch.equal(scored, score_batch(fresh, batch, CPU))
    assert base_digest(model) == base


def test_the_critic_has_an_adapter_of_its_own_on_the_same_base(starting_model: Path) -> None:
    model = adapted(starting_model)
    critic = Critic(model, OptimizerConfig(lr=0.1))
    own, base = {name: each.clone() for name, each in own_adapter(model).items()}, base_digest(model)
    for _ in range(2):  # the first step moves the head, which is 0 at the start
        critic.loss(TOKENS, TOKENS > 0, torch.ones(2, 6), torch.zeros(2, 6), clip=None, denominator=1.0).backward()  # type: ignore[no-untyped-call]
        critic.step()
    assert len(critic.trainable.masters) == len(own) + 2, "A and B of each layer, and the head"
    assert base_digest(model) == base
    assert all(torch.equal(each, own[name]) for name, each in own_adapter(model).items())
    changed = [p for n, p in critic.trainable.model.named_parameters() if ".lora_B." in n]
    assert all(not torch.equal(p, q) for p, q in zip(changed, list(own.values())[1::2], strict=True))


def test_checkpointed_activations_change_no_gradient(starting_model: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted(starting_model)
        if checkpointed:
            checkpoint_activations(model)
        policy = TrainablePolicy(model, OptimizerConfig())
        token_logprobs(model, TOKENS, ONE).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([gradient.clone() for gradient in policy.gradients()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "wrong_proj"), "Qwen3ForCausalLM has no linear layer wrong_proj; it has down_proj, gate_proj"),
        (("q_proj", "lm_head"), "the output head cannot have an adapter"),
    ],
)
def test_targets_that_do_not_fit_the_model_are_refused(
    targets: tuple[str, ...], message: str, starting_model: Path
) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(load(starting_model), LoraConfig(rank=4, targets=targets))
