"""A resolved run written as TOML."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.config import RunConfig
from palimpsest.common.config.to_toml import to_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
POSITIVE = st.floats(min_value=0, max_value=1e300, exclude_min=True, allow_nan=False)
SHARE = st.floats(0, 1)
COUNT = st.integers(1, 10**6)
ENGINES = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("vllm")},
        optional={"kv_cache_gib": POSITIVE, "compile": st.booleans(), "tensor_parallel": COUNT},
    ),
    st.fixed_dictionaries(
        {"kind": st.just("scripted"), "texts": st.lists(TEXT, min_size=1, max_size=3)},
        optional={"tokens_per_s": POSITIVE},
    ),
)
PATHS = st.text("abc/._- äß'\"", min_size=1, max_size=12)
RUNS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"path": TEXT},
            optional={
                "attention": st.sampled_from(["sdpa", "eager"]),
                "chat_template_options": st.dictionaries(
                    TEXT, st.one_of(TEXT, st.booleans(), st.integers(), st.floats(allow_nan=False)), max_size=3
                ),
            },
        ),
        "tasks": st.fixed_dictionaries({"environments": st.dictionaries(TEXT, POSITIVE, max_size=3)}),
        "learner": st.fixed_dictionaries(
            {"versions": COUNT},
            optional={
                "optimizer": st.fixed_dictionaries({}, optional={"lr": POSITIVE, "beta1": SHARE, "warmup": COUNT}),
                "loss": st.fixed_dictionaries({}, optional={"clip_low": SHARE, "entropy": SHARE}),
                "checkpoint": st.fixed_dictionaries({}, optional={"folder": PATHS}),
                "record": st.booleans(),
            },
        ),
    },
    optional={
        "run": st.fixed_dictionaries({}, optional={"seed": st.integers(-(2**80), 2**80), "folder": PATHS}),
        "bus": st.fixed_dictionaries({}, optional={"path": PATHS}),
        "rollout": st.fixed_dictionaries({}, optional={"engine": ENGINES}),
        "env_gateway": st.fixed_dictionaries({}, optional={"plugins": st.dictionaries(TEXT, TEXT, max_size=2)}),
    },
)


def a_run(**sections: Any) -> RunConfig:
    required = {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 3}}
    return RunConfig.model_validate({**required, **sections})


@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_the_written_toml_reads_back_as_the_same_run(values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_every_default_is_written() -> None:
    shown = tomllib.loads(to_toml(a_run()))
    assert shown["learner"]["optimizer"]["lr"] == 1e-6
    assert shown["rollout"]["engine"]["kind"] == "vllm"
    assert set(shown) == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", ["reasoning_gym.chain_sum", "two words", "", "Ä", "a\nb", "\x7f"])
def test_an_environment_of_any_name_reads_back(name: str) -> None:
    config = a_run(tasks={"environments": {name: 1.0}})
    assert tomllib.loads(to_toml(config))["tasks"]["environments"] == {name: 1.0}


def test_a_folder_is_written_as_given() -> None:
    config = a_run(run={"folder": "my runs/ß"})
    assert tomllib.loads(to_toml(config))["run"]["folder"] == str(Path("my runs/ß"))
