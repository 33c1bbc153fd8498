"""A model's limits are refused from its JSON files, with both numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.model_limits import (
    positions,
    refuse_attention,
    refuse_limits,
    refuse_tokenizer,
    tokenizer_ids,
)
from palimpsest.common.sessions.wire import Message
from palimpsest.common.tokenizer import load_tokenizer
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.chat_renderer import ChatRenderer


def a_model(folder: Path, *, config: dict[str, Any], settings: dict[str, Any] | None = None, tokens: int = 10) -> Path:
    """A folder without weights. Its tokenizer has 2 added tokens among `tokens` tokens."""
    folder.mkdir()
    vocabulary = {f"t{i}": i for i in range(tokens - 2)}
    added = [{"id": tokens - 2, "content": "<|a|>"}, {"id": tokens - 1, "content": "<|b|>"}]
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return folder


def a_run(model: Path, *, longest: int = 1023, engine: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "tasks": {"environments": {"lookup": 1.0}},
            "sampling": {"max_trajectory_tokens": longest},
            "rollout": {"engine": engine or {"kind": "vllm"}},
            "learner": {"versions": 1},
        }
    )


@pytest.mark.parametrize(
    ("config", "engine", "message"),
    [
        ({"num_experts": 4}, {}, r"names gate_proj, but .* a mixture of experts \(num_experts in config.json\)"),
        ({}, {"tensor_parallel": 2}, "rollout.engine.tensor_parallel is 2: an adapter cannot be read back"),
    ],
)
def test_an_adapter_is_refused_where_it_does_not_work(
    tmp_path: Path, config: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    model = a_model(tmp_path / "model", config={"vocab_size": 10, **config})
    run = a_run(model, engine={"kind": "vllm", **engine})
    refuse_limits(run)
    learner = run.learner.model_copy(update={"lora": LoraConfig(rank=8)})
    with pytest.raises(UserError, match=message):
        refuse_limits(run.model_copy(update={"learner": learner}))


def test_experts_of_a_dense_model_are_not_divided(tmp_path: Path) -> None:
    engine = {"kind": "vllm", "tensor_parallel": 2, "expert_parallel": True}
    dense = a_model(tmp_path / "dense", config={"vocab_size": 10})
    with pytest.raises(UserError, match=r"expert_parallel is true, but the model in .*dense has no experts"):
        refuse_limits(a_run(dense, engine=engine))
    mixture = {"text_config": {"vocab_size": 10, "num_experts": 4}}
    refuse_limits(a_run(a_model(tmp_path / "mixture", config=mixture), engine=engine))


def test_experts_are_not_divided_over_one_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="tensor_parallel is 1: one GPU holds all experts"):
        a_run(tmp_path, engine={"kind": "vllm", "expert_parallel": True})


def test_the_attention_of_a_mixture_may_have_an_adapter(tmp_path: Path) -> None:
    run = a_run(a_model(tmp_path / "model", config={"vocab_size": 10, "num_experts": 4}))
    lora = LoraConfig(rank=8, targets=("q_proj", "self_attn.o_proj"))
    refuse_limits(run.model_copy(update={"learner": run.learner.model_copy(update={"lora": lora})}))


@pytest.mark.parametrize("rows", [10, 64])
def test_a_tokenizer_that_fits_is_accepted_and_padding_rows_too(tmp_path: Path, rows: int) -> None:
    refuse_limits(a_run(a_model(tmp_path / "model", config={"vocab_size": rows})))


@pytest.mark.parametrize("nested", [False, True])
def test_a_token_without_a_row_is_refused(tmp_path: Path, nested: bool) -> None:
    config: dict[str, Any] = {"vocab_size": 9}
    model = a_model(tmp_path / "model", config={"text_config": config} if nested else config)
    with pytest.raises(UserError) as error:
        refuse_limits(a_run(model))
    assert str(error.value) == (
        f"model.path: the tokenizer of {model} has 10 tokens with ids up to 9, but the model's embedding has 9 rows "
        f"(vocab_size in config.json), and a trajectory can contain <|b|> (id 9). Resize the embedding "
        f"(`model.resize_token_embeddings(len(tokenizer))`) and save the model, or remove the added tokens from the "
        f"tokenizer"
    )


def test_special_tokens_that_the_tokenizer_adds_when_it_loads_count(tmp_path: Path) -> None:
    settings = {"eos_token": "<|b|>", "pad_token": {"content": "<|pad|>"}, "extra_special_tokens": ["<|c|>"]}
    model = a_model(tmp_path / "model", config={"vocab_size": 11}, settings=settings)
    ids = tokenizer_ids(model)
    assert ids is not None
    assert (len(ids.ids), ids.largest, ids.unnamed) == (12, 11, {"<|c|>"})
    refuse_limits(a_run(model))  # only <|c|> has no row, and no text becomes it
    (model / "config.json").write_text(json.dumps({"vocab_size": 10}))
    with pytest.raises(UserError, match=r"12 tokens with ids up to 11, .* has 10 rows .* contain <\|pad\|> \(id 10\)"):
        refuse_limits(a_run(model))


def test_a_vocabulary_that_is_a_list_counts_by_its_index(tmp_path: Path) -> None:
    model = a_model(tmp_path / "model", config={})
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    ids = tokenizer_ids(model)
    assert ids is not None
    assert ids.ids == {"a": 0, "b": 1}


def test_a_special_token_that_nothing_writes_needs_no_row(tmp_path: Path) -> None:
    """Like the image token of gemma-3-1b, whose id is one beyond the rows of the text model."""
    model = a_model(tmp_path / "model", config={"vocab_size": 9})
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["special"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse_limits(a_run(model))
    refused = pytest.raises(UserError, match=r"a trajectory can contain <\|b\|> \(id 9\)")
    for settings in ({"unk_token": "<|b|>"}, {"chat_template": "{{ '<|b|>' }}"}):
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        with refused:
            refuse_limits(a_run(model))
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}<|b|>")
    with refused:
        refuse_limits(a_run(model))


def test_a_folder_without_these_files_is_left_to_other_checks(tmp_path: Path) -> None:
    refuse_limits(a_run(tmp_path / "absent"))
    model = a_model(tmp_path / "model", config={})
    (model / "tokenizer.json").write_text("[]")
    refuse_limits(a_run(model))


def test_a_trajectory_longer_than_the_positions_is_refused_with_both_keys(tmp_path: Path) -> None:
    model = a_model(tmp_path / "model", config={"vocab_size": 10, "max_position_embeddings": 1024})
    refuse_limits(a_run(model, longest=1023))
    with pytest.raises(UserError) as error:
        refuse_limits(a_run(model, longest=1024))
    assert str(error.value) == (
        f"sampling.max_trajectory_tokens is 1024, but the model in {model} has 1024 positions (max_position_embeddings "
        f"in config.json), and the engine needs one token more. Set sampling.max_trajectory_tokens to at most 1023, or "
        f"choose a model.path with more positions"
    )
    scripted = {"kind": "scripted", "texts": ["a"]}
    refuse_limits(a_run(model, longest=1024, engine=scripted))
    with pytest.raises(UserError, match=r"is 1025, but .* has 1024 positions .* to at most 1024, or"):
        refuse_limits(a_run(model, longest=1025, engine=scripted))


@pytest.mark.parametrize("nested", [False, True])
def test_attention_that_ignores_a_soft_cap_is_refused(tmp_path: Path, nested: bool) -> None:
    config: dict[str, Any] = {"vocab_size": 10, "attn_logit_softcapping": 50.0}
    model = a_model(tmp_path / "model", config={"text_config": config} if nested else config)
    with pytest.raises(UserError) as error:
        refuse_limits(a_run(model))
    assert str(error.value) == (
        f"model.attention is sdpa, which ignores the soft cap of attention scores of the model in {model} "
        f'(attn_logit_softcapping 50.0 in config.json). Set model.attention = "eager", or "flash_attention_2" on a GPU'
    )
    for attention, cap in (("eager", 50.0), ("flash_attention_2", 50.0), ("sdpa", None)):
        refuse_attention(str(model), attention, config | {"attn_logit_softcapping": cap})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"n_positions": 512}, (512, "n_positions")),
        ({"max_position_embeddings": 4096, "seq_length": 2048}, (2048, "seq_length")),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, (131072, "model_max_length")),
        ({"text_config": {"max_position_embeddings": 64}}, (64, "max_position_embeddings")),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2}},
            (200, "max_position_embeddings times the factor of rope_scaling"),
        ),
        (
            {"max_position_embeddings": 100, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            (100, "max_position_embeddings"),
        ),
        (
            {"max_position_embeddings": 100, "rope_parameters": {"a": {"rope_type": "linear", "factor": 3.0}, "b": {}}},
            (300, "max_position_embeddings times the factor of rope_parameters"),
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            (100, "max_position_embeddings"),
        ),
    ],
)
def test_positions_are_those_that_vllm_derives(config: dict[str, Any], expected: tuple[int, str] | None) -> None:
    assert positions(config) == expected


def test_the_loaded_tokenizer_is_refused_if_it_has_a_token_without_a_row(starting_model: Path, tmp_path: Path) -> None:
    refuse_tokenizer(str(starting_model))
    refuse_tokenizer("absent/model")
    narrow = shutil.copytree(starting_model, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(UserError, match=f"has {config['vocab_size'] - 1} rows"):
        refuse_tokenizer(str(narrow))


def test_the_template_in_use_decides_whether_a_special_token_without_a_row_can_occur(
    starting_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(starting_model, tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    assert tokenizer.convert_tokens_to_ids("<image>") == json.loads((model / "config.json").read_text())["vocab_size"]
    refuse_tokenizer(str(model))
    with pytest.raises(UserError, match="a trajectory can contain <image>"):
        refuse_tokenizer(str(model), template="{{ '<image>' }}")
    renderer = ChatRenderer.load(str(model), {})
    rows = tokenizer.convert_tokens_to_ids("<image>")
    assert max(renderer.begin([Message(role="user", content="an <image> in a text")], [])) < rows


def test_the_tokenizer_of_a_folder_is_examined_without_torch(starting_model: Path) -> None:
    code = (
        "import sys; from palimpsest.common.model_limits import refuse_tokenizer; refuse_tokenizer(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(starting_model)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"
