"""A run begins with an adapter from a folder, computes what peft computes with it, and refuses one that differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from palimpsest.common.base_model import base_digest
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.user_error import UserError
from palimpsest.export.export import export
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.model.starting_adapter import load_starting_adapter
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.report.named_run import named_run
from tests.learner_parts.adapters import ADAPTER, LORA, adapted, own_adapter
from tests.learner_parts.models import load
from tests.records.stored_runs import a_run, put

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])
ONE = torch.ones(2, 1)
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def form(base: Path) -> Adapter:
    return Adapter(base_digest(str(base)), ADAPTER.rank, ADAPTER.alpha, ADAPTER.targets)


@pytest.fixture(scope="module")
def exported(starting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a stored run, written by `palimpsest export --adapter`. Must not be changed."""
    home = a_run(tmp_path_factory.mktemp("exported") / "first", starting_model)
    put(home, 1, raw_tensors(named_weights(adapted(starting_model, seed=3))), adapter=form(starting_model))
    config, _ = named_run([str(home)], {}, program="")
    return export(config, home, home.parent / "adapter", alone=True).folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(exported, tmp_path / "adapter")


def begun(base: Path, folder: Path) -> torch.nn.Module:
    """The model of a run that begins with the adapter."""
    model = load(base)
    add_adapter(model, LORA)
    load_starting_adapter(model, folder, form(base), str(base))
    return model


def check_logprobs(model: torch.nn.Module, oracle: Any, base: Path) -> None:
    """Compare a model's log-probs to those of a model that peft loaded, bit for bit."""
    logits = oracle(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, logits)
    assert not torch.equal(load(base)(input_ids=TOKENS).logits, logits), "the adapter changes something"
    exact = logits[:, :-1].float().log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert torch.allclose(token_logprobs(model, TOKENS, ONE)[:, 1:], exact, atol=1e-6)


@torch.no_grad()
def test_an_exported_adapter_computes_what_it_computes_in_peft(starting_model: Path, exported: Path) -> None:
    oracle = PeftModel.from_pretrained(load(starting_model), exported, autocast_adapter_dtype=False).eval()
    model = begun(starting_model, exported)
    check_logprobs(model, oracle, starting_model)
    stored = own_adapter(adapted(starting_model, seed=3))
    assert all(torch.equal(each, stored[name]) for name, each in own_adapter(model).items())


@torch.no_grad()
def test_an_adapter_saved_by_peft_computes_what_it_computes_in_peft(starting_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    settings = PeftConfig(
        r=4, lora_alpha=8, target_modules=list(LORA.targets), lora_dropout=0.1, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    made = get_peft_model(load(starting_model), settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    made.save_pretrained(str(tmp_path / "own"))
    oracle = PeftModel.from_pretrained(load(starting_model), tmp_path / "own", autocast_adapter_dtype=False).eval()
    check_logprobs(begun(starting_model, tmp_path / "own"), oracle, starting_model)


def set_config(folder: Path, **changed: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors. The file then has no digest of the base model, as a file of peft."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 8}, "learner.lora.rank is 4, the adapter has 8.: set learner.lora to the values of the adapter"),
        ({"lora_alpha": 16}, "learner.lora.alpha is 8.0, the adapter has 16"),
        ({"target_modules": ["q_proj"]}, r'has \["q_proj"\]'),
        ({"target_modules": "all-linear"}, 'the adapter has "all-linear"'),
        ({"use_rslora": True}, r"does not compute \(use_rslora = true\)"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = "),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
        ({"peft_type": "IA3"}, 'peft_type = "IA3"'),
        ({"a_later_variant": True}, "a_later_variant = true"),
    ],
)
def test_an_adapter_of_another_form_is_refused(
    changed: dict[str, Any], message: str, starting_model: Path, folder: Path
) -> None:
    set_config(folder, **changed)
    with pytest.raises(UserError, match=message):
        begun(starting_model, folder)


def replaced(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (Q, None, r"lacks tensors \(1: base_model\S+layers.0.self_attn.q_proj.lora_A.weight\)"),
        ("base_model.model.lm_head.weight", torch.ones(2), r"has unknown tensors \(1: base_model.model.lm_head.weight"),
        (Q, torch.ones(2, 64, dtype=torch.bfloat16), r"has shape \[2, 64\]; model.path needs \[4, "),
    ],
)
def test_other_tensors_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, starting_model: Path, folder: Path
) -> None:
    set_tensors(folder, replaced(name, tensor))
    with pytest.raises(UserError, match=message):
        begun(starting_model, folder)


def test_values_that_would_be_rounded_or_are_not_finite_are_refused(starting_model: Path, folder: Path) -> None:
    set_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].float()}))
    with pytest.raises(UserError, match="is float32; a run computes with bfloat16"):
        begun(starting_model, folder)
    set_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].bfloat16() * float("nan")}))
    with pytest.raises(UserError, match="values that are not finite"):
        begun(starting_model, folder)


def test_a_missing_or_damaged_file_is_refused(starting_model: Path, folder: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged or cannot be read"):
        begun(starting_model, folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        begun(starting_model, folder)
    config.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        begun(starting_model, folder)
    config.unlink()
    with pytest.raises(UserError, match=r"learner.lora.start: .* holds no adapter"):
        begun(starting_model, folder)


def test_an_adapter_of_another_base_is_refused(
    starting_model: Path, untied_model: Path, folder: Path, tmp_path: Path
) -> None:
    """By the digest that the export writes; without it, by the name in the config."""
    copy = shutil.copytree(starting_model, tmp_path / "copy")
    set_config(folder, base_model_name_or_path="elsewhere/gone")
    begun(copy, folder)
    with pytest.raises(UserError, match="belongs to another base model"):
        begun(untied_model, folder)
    set_tensors(folder, lambda _: None)
    set_config(folder, base_model_name_or_path=str(starting_model))
    begun(copy, folder)
    with pytest.raises(UserError, match="belongs to another base model"):
        begun(untied_model, folder)
    set_config(folder, base_model_name_or_path="someone/other")
    with pytest.raises(UserError, match=r'names "someone/other" as its base model, and model.path is'):
        begun(starting_model, folder)
    set_config(folder, base_model_name_or_path=str(starting_model))
    begun(starting_model, folder)
