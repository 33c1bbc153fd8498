"""An exported adapter computes the same under peft as in the run; merged, it becomes a plain model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from palimpsest.common.base_model import base_digest
from palimpsest.common.user_error import UserError
from palimpsest.export.export import export
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.report.named_run import named_run
from tests.learner_parts.adapters import ADAPTER, LORA, adapted
from tests.learner_parts.models import load
from tests.records.stored_runs import a_run, put

pytestmark = pytest.mark.thorough
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])


@pytest.fixture(params=["starting_model", "untied_model"])
def base(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def stored_run(tmp_path: Path, base: Path, model: torch.nn.Module, *, digest: str = "") -> Path:
    home = a_run(tmp_path / "first", base)
    adapter = type(ADAPTER)(digest or base_digest(str(base)), ADAPTER.rank, ADAPTER.alpha, ADAPTER.targets)
    put(home, 1, raw_tensors(named_weights(model)), adapter=adapter)
    return home


@torch.no_grad()
def test_alone_peft_loads_it_and_merged_transformers_does(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    home = stored_run(tmp_path, base, model)
    config, _ = named_run([str(home)], {}, program="")
    logits = model(input_ids=TOKENS).logits

    alone = export(config, home, tmp_path / "alone", alone=True).folder
    assert not (alone / "config.json").exists()
    assert not (alone / "model.safetensors").exists()
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    loaded = PeftModel.from_pretrained(load(base), alone, autocast_adapter_dtype=False).eval()
    assert torch.equal(loaded(input_ids=TOKENS).logits, logits)
    assert "PeftModel" in (alone / "README.md").read_text()

    merged = export(config, home, tmp_path / "merged").folder
    plain = load(merged)
    before = load(base).state_dict()
    by_peft = loaded.merge_and_unload().state_dict()
    for name, tensor in plain.state_dict().items():
        target = any(f".{each}." in name for each in LORA.targets)
        assert torch.equal(tensor, before[name]) != target, name
        assert torch.allclose(tensor.float(), by_peft[name].float(), atol=0.02), name  # peft rounds B A to bf16 first
    far, near = (_distance(other, logits) for other in (load(base)(input_ids=TOKENS).logits, plain(TOKENS).logits))
    assert near < far / 10


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float().log_softmax(-1) - right.float().log_softmax(-1)).abs().mean())


def test_another_base_is_not_merged(starting_model: Path, tmp_path: Path) -> None:
    home = stored_run(tmp_path, starting_model, adapted(starting_model), digest="0" * 64)
    config, _ = named_run([str(home)], {}, program="")
    with pytest.raises(UserError, match="is not the base model of this version"):
        export(config, home, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert export(config, home, tmp_path / "alone", alone=True).tensors == len(ADAPTER.targets) * 2 * 2


def test_whole_weights_have_no_adapter_to_export(starting_model: Path, tmp_path: Path) -> None:
    home = a_run(tmp_path / "first", starting_model)
    put(home, 1, raw_tensors(named_weights(load(starting_model))))
    config, _ = named_run([str(home)], {}, program="")
    with pytest.raises(UserError, match="version 1 holds whole weights: leave out --adapter"):
        export(config, home, tmp_path / "alone", alone=True)
