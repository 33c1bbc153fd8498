"""Keys that may change while a run is running."""

import pytest

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.settings import SETTINGS, SettingRefused, value_of, values_of, with_settings


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 3}}
    )


def refusal(config: RunConfig, **values: object) -> tuple[str, str]:
    with pytest.raises(SettingRefused) as raised:
        with_settings(config, values)
    return raised.value.code, str(raised.value)


def test_new_values_are_set_and_all_others_stay(config: RunConfig) -> None:
    changed = with_settings(config, {"learner.optimizer.lr": 1e-4, "learner.discrepancy.tokens": [0.5, 2]})
    assert changed.learner.optimizer.lr == 1e-4
    assert changed.learner.discrepancy.tokens == (0.5, 2.0)
    assert with_settings(changed, {"learner.optimizer.lr": 1e-6, "learner.discrepancy.tokens": "off"}) == config


def test_every_key_exists_and_takes_its_own_value(config: RunConfig) -> None:
    assert with_settings(config, values_of(config)) == config
    assert value_of(config, "learner.loss.clip_high") == 0.2
    assert "learner.max_grad_norm" not in SETTINGS


def test_a_value_outside_its_range_is_refused_with_the_key(config: RunConfig) -> None:
    code, text = refusal(config, **{"learner.optimizer.lr": -1})
    assert (code, text) == ("invalid_value", "learner.optimizer.lr: input should be greater than 0, got -1")


def test_values_that_contradict_each_other_are_refused(config: RunConfig) -> None:
    code, text = refusal(config, **{"learner.optimizer.warmup": 10, "learner.optimizer.decay": 5})
    assert code == "invalid_value"
    assert "decay (5) must be greater than warmup (10)" in text


def test_a_key_that_is_fixed_when_a_run_begins_is_refused(config: RunConfig) -> None:
    code, text = refusal(config, **{"learner.groups_per_batch": 8})
    assert code == "needs_new_run"
    assert text.startswith("learner.groups_per_batch is fixed when a run begins")


def test_a_misspelled_key_is_refused_with_the_closest_one(config: RunConfig) -> None:
    assert refusal(config, **{"learner.optimizer.lrr": 1.0}) == (
        "unknown_setting",
        "learner.optimizer.lrr is not a key of [learner.optimizer]; did you mean learner.optimizer.lr?",
    )
