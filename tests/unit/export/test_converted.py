"""Export of a model whose checkpoint names its tensors otherwise than the model in memory."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from palimpsest.export.export import export
from palimpsest.services.learner.model.weights import raw_tensors
from palimpsest.services.report.named_run import named_run
from tests.learner_parts.models import load, perturb
from tests.records.stored_runs import a_run, put

pytestmark = pytest.mark.thorough


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small mixture of experts; its checkpoint has separate tensors for each expert."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "starting"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@torch.no_grad()
def test_a_mixture_of_experts_has_the_names_of_its_checkpoint(model: Path, tmp_path: Path, shard_bytes: int) -> None:
    trained = load(model)
    perturb(trained, by=0.1, seed=1)
    own = dict(trained.state_dict())  # as earlier releases stored them
    assert not set(own) <= names(model), "the names must differ for this test"
    home = a_run(tmp_path / "first", model)
    put(home, 1, raw_tensors(own))
    config, _ = named_run([str(home)], {}, program="")
    export(config, home, tmp_path / "out", shard_bytes=shard_bytes)
    assert names(tmp_path / "out") == names(model)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or shard_bytes == 10**9
    tokens = torch.arange(1, 33)[None]
    exported = load(tmp_path / "out")
    assert torch.equal(exported(input_ids=tokens).logits, trained(input_ids=tokens).logits)
    assert not torch.equal(exported(input_ids=tokens).logits, load(model)(input_ids=tokens).logits)
