"""learner.layout = "packed": each row has the log-probs of the row alone; what would not is refused at the start."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest import rescore_attention
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.model import packing
from palimpsest.services.learner.model.policy import (
    checkpoint_activations,
    load_model,
    score_batch,
    score_batch_and_entropy,
)
from tests.learner_parts.families import EAGER, FAMILIES, SMALL, WINDOW, build
from tests.learner_parts.models import CPU
from tests.records.builders import a_row

WINDOWS = ("Mistral", "Gemma 3 (text)", "Phi-3")
PACKABLE = [family for family in FAMILIES if family not in (*EAGER, *WINDOWS)]
ROUNDING = 0.05
"""Nats: bf16 rounding of a random model, as tests/unit/learner/model/test_families.py bounds it."""
LENGTHS = (40, 7, 23, 1, 64)
pytestmark = pytest.mark.thorough


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [
        a_row(
            f"r{i}", torch.randint(3, 250, (length,), generator=generator).tolist(), [-1] + [0] * (length - 1),
            temperature=1.0 - 0.2 * (i % 2),
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def packed(folder: Path) -> torch.nn.Module:
    return load_model(str(folder), CPU, "sdpa", layout="packed")


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_rows_have_the_log_probs_and_entropies_of_each_row_alone(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model")
    model, padded = packed(folder), load_model(str(folder), CPU, "sdpa")
    with torch.no_grad():
        together = score_batch_and_entropy(model, pad(rows(*LENGTHS)), CPU)
        for i, row in enumerate(rows(*LENGTHS)):
            alone = score_batch_and_entropy(padded, pad([row]), CPU)
            for values, expected in zip(together, alone, strict=True):
                assert torch.allclose(values[i, : len(row.tokens)], expected[0], atol=ROUNDING)
                assert not values[i, len(row.tokens) :].any()
    assert int(together[0].ne(0).sum()) == sum(LENGTHS) - len(LENGTHS)


def test_no_row_depends_on_another(starting_model: Path) -> None:
    """Same layout, same bits: other tokens in one row change nothing in the others."""
    model = packed(starting_model)
    made, others = rows(*LENGTHS), rows(*LENGTHS, seed=1)
    with torch.no_grad():
        values = score_batch(model, pad(made), CPU)
        for changed in range(len(made)):
            mixed = [others[i] if i == changed else row for i, row in enumerate(made)]
            for i, row in enumerate(score_batch(model, pad(mixed), CPU)):
                assert torch.equal(row, values[i]) == (i != changed or LENGTHS[i] == 1)


def test_the_model_sees_no_padding_and_no_mask(starting_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(starting_model)
    shapes: list[tuple[Any, Any]] = []
    whole = packing._whole

    def seen(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        shapes.append((query.shape[2], mask))
        return whole(module, query, key, value, mask, **options)

    with torch.no_grad():
        score_batch(model, pad(rows(3)), CPU)  # finds the head
        monkeypatch.setattr(packing, "_whole", seen)
        score_batch(model, pad(rows(*LENGTHS)), CPU)
    assert shapes == [(length, None) for length in LENGTHS] * model.config.num_hidden_layers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_padded_rows_within_the_order_of_sums(checkpointing: bool, starting_model: Path) -> None:
    """In float32, where the rounding of bf16 does not hide a difference."""
    gradients = []
    for layout in ("packed", "padded"):
        model = load_model(str(starting_model), CPU, "sdpa", layout=layout).float()
        if checkpointing:
            checkpoint_activations(model)
        score_batch(model, pad(rows(*LENGTHS)), CPU).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(gradients[0]) > 0
    for own, expected in zip(*gradients, strict=True):
        assert torch.allclose(own, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_checkpointed_layers_give_the_same_bits(starting_model: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = packed(starting_model)
        if checkpointing:
            checkpoint_activations(model)
        score_batch(model, pad(rows(*LENGTHS)), CPU).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("family", "why"),
    [("Mistral", "sliding_window"), ("Gemma 3 (text)", "sliding_attention"), ("Phi-3", "sliding_window")],
)
def test_a_family_with_a_sliding_window_is_refused_with_the_key(family: str, why: str, tmp_path: Path) -> None:
    sentence = rf'learner\.layout is "packed", which the model in .* does not support: {why} in config\.json'
    with pytest.raises(UserError, match=sentence):
        packed(build(family, tmp_path / "model"))


def test_eager_attention_is_refused(starting_model: Path) -> None:
    with pytest.raises(UserError, match=r'model\.attention = "eager" cannot compute packed rows'):
        load_model(str(starting_model), CPU, "eager", layout="packed")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
    ],
)
def test_a_family_with_state_or_positions_of_its_own_is_refused(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r'learner\.layout is "packed", which .+ does not support|model\.attention is sdpa'
    ):
        packed(tmp_path)


def test_an_attention_that_ignores_the_rows_is_found_at_the_start(
    starting_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignorant(*arguments: Any, **options: Any) -> Any:
        options.pop("cu_seq_lens_q", None)
        return packing._whole(*arguments, **options)

    monkeypatch.setattr(packing, "attend", ignorant)
    with pytest.raises(UserError, match="the values of a row depend on the rows before it"):
        packed(starting_model)


def test_on_a_gpu_torchs_attention_for_unequal_rows_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes only: no GPU is needed, and none computes."""
    monkeypatch.setattr(packing, "attend_in_rows", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with FakeTensorMode():
        query, key = (torch.empty(1, heads, 12, 32, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        starts = torch.empty(4, dtype=torch.int32, device="cuda")
        named = {"cu_seq_lens_q": starts, "max_length_q": 5, "scaling": 0.2, "dropout": 0.0}
        for attend in (packing.attend, rescore_attention.attend_within_rows):
            out, _ = attend(torch.nn.Module(), query, key, key, None, **named)
            assert (tuple(out.shape), out.device.type) == ((1, 12, 4, 32), "cuda")


@pytest.mark.parametrize(
    ("dtype", "size", "capability"),
    [
        (torch.float32, 64, (9, 0)),  # the canaries' passes in float32
        (torch.bfloat16, 60, (9, 0)),
        (torch.bfloat16, 512, (9, 0)),
        (torch.bfloat16, 64, (7, 5)),
    ],
)
def test_a_gpu_computes_row_by_row_what_that_attention_does_not(
    dtype: torch.dtype, size: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    def in_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **_: Any) -> Tensor:
        calls.append(lengths)
        return query.transpose(1, 2)

    monkeypatch.setattr(packing, "attend_in_rows", in_rows)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        query = torch.empty(1, 2, 12, size, dtype=dtype, device="cuda")
        starts: Any = SimpleNamespace(diff=lambda: SimpleNamespace(tolist=lambda: [5, 4, 3]))  # fake ones have none
        packing.attend(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=starts, max_length_q=5)
    assert calls == [[5, 4, 3]]
    assert not packing.has_varlen(dtype, size, capability)


def test_a_window_that_reaches_the_attention_is_refused() -> None:
    query = torch.zeros(1, 1, 4, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(packing.NotPackable, match="its attention has sliding_window"):
        packing.attend(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=starts, sliding_window=WINDOW)
    with pytest.raises(packing.NotPackable, match="the model makes an attention mask of its own"):
        packing.attend(torch.nn.Module(), query, query, query, torch.ones(1, 1, 4, 4), cu_seq_lens_q=starts)
