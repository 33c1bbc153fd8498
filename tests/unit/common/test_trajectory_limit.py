"""The default of sampling.max_trajectory_tokens: the model's limit, within the passes of learner and engine."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.trajectory_limit import TrajectoryLimit, resolved_toml, trajectory_limit, with_limit
from palimpsest.common.user_error import UserError

SCRIPTED = {"engine": {"kind": "scripted", "texts": ["a"]}}


def a_run(
    folder: Path,
    *,
    positions: int | None = None,
    tokenizer: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> RunConfig:
    folder.mkdir()
    config = {} if positions is None else {"max_position_embeddings": positions}
    files = {"config": config, "tokenizer_config": tokenizer, "generation_config": generation}
    for name, values in files.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values))
    required = {"model": {"path": str(folder)}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 1}}
    return RunConfig.model_validate(required | sections)


def test_a_value_of_the_run_file_is_the_limit(tmp_path: Path) -> None:
    run = a_run(tmp_path / "m", positions=2048, sampling={"max_trajectory_tokens": 900})
    assert trajectory_limit(run) == TrajectoryLimit(900, "the configuration")


def test_positions_are_the_default_less_the_token_of_the_engine(tmp_path: Path) -> None:
    limit = trajectory_limit(a_run(tmp_path / "m", positions=2048))
    assert limit.tokens == 2047
    assert limit.source == (
        "the 2048 positions of the model (max_position_embeddings in config.json, less the 1 token that the engine "
        "adds)"
    )
    assert trajectory_limit(a_run(tmp_path / "s", positions=2048, rollout=SCRIPTED)).tokens == 2048


def test_many_positions_enlarge_neither_a_pass_of_the_learner_nor_a_step_of_the_engine(tmp_path: Path) -> None:
    """131,072 positions: the engine's buffers and the learner's rows keep the size that their keys allow."""
    run = a_run(tmp_path / "m", positions=131_072)
    assert trajectory_limit(run) == TrajectoryLimit(
        8191, "rollout.engine.max_concurrent_tokens (8192, less the 1 token that the engine adds)"
    )
    wide = {"engine": {"kind": "vllm", "max_concurrent_tokens": 65536}}
    assert trajectory_limit(a_run(tmp_path / "n", positions=131_072, rollout=wide)) == TrajectoryLimit(
        16384, "learner.micro_batch_tokens (16384)"
    )


@pytest.mark.parametrize(
    ("files", "tokens", "source"),
    [
        ({"tokenizer": {"model_max_length": 1500}}, 1500, "model_max_length in tokenizer_config.json of the model"),
        ({"generation": {"max_length": 1200}}, 1200, "max_length in generation_config.json of the model"),
        ({"tokenizer": {"model_max_length": 10**30}}, 2047, None),  # what transformers writes for "no limit"
        ({"generation": {"max_length": None}}, 2047, None),
    ],
)
def test_limits_of_tokenizer_and_generation_count(
    tmp_path: Path, files: dict[str, Any], tokens: int, source: str | None
) -> None:
    limit = trajectory_limit(a_run(tmp_path / "m", positions=2048, **files))
    assert limit.tokens == tokens
    assert source is None or limit.source == source


def test_a_limit_without_room_for_a_prompt_is_refused_with_both_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        trajectory_limit(a_run(tmp_path / "m", positions=512))
    assert str(error.value) == (
        "sampling.max_turn_tokens (512) leaves no room for a prompt in sampling.max_trajectory_tokens, which is 511, "
        "from the 512 positions of the model (max_position_embeddings in config.json, less the 1 token that the engine "
        "adds). Lower sampling.max_turn_tokens, or choose a model.path with more positions"
    )


def test_a_hub_id_whose_files_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = a_run(tmp_path / "m", model={"path": "no-such-owner/no-such-model"})
    with pytest.raises(UserError, match=r"config.json of no-such-owner/no-such-model .*: set sampling.max_trajectory_"):
        trajectory_limit(run)
    assert resolved_toml(run).startswith("# sampling.max_trajectory_tokens comes from the model when the run starts: ")


def test_the_shown_configuration_states_the_limit_and_its_source(tmp_path: Path) -> None:
    run = a_run(tmp_path / "m", positions=2048)
    text = resolved_toml(run)
    assert text.splitlines()[0] == f"# sampling.max_trajectory_tokens = 2047, from {trajectory_limit(run).source}"
    assert tomllib.loads(text)["sampling"]["max_trajectory_tokens"] == 2047
    assert resolved_toml(with_limit(run)).splitlines()[0].startswith("[")


def test_a_worker_with_another_limit_than_the_learner_is_refused_with_both_numbers() -> None:
    limit = TrajectoryLimit(2047, "the 2048 positions of the model")
    limit.refuse_other(2047, worker="worker-0")
    with pytest.raises(UserError) as error:
        limit.refuse_other(4095, worker="worker-0")
    assert str(error.value) == (
        "sampling.max_trajectory_tokens is 2047 on worker-0, from the 2048 positions of the model, but the learner "
        "offers trajectories of up to 4095 tokens. Give learner and worker the same model folder and the same run "
        "file, or set sampling.max_trajectory_tokens"
    )
