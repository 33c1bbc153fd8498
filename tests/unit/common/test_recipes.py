"""Recipes: each is a valid run, keys of the run override it, and unknown names are reported with the nearest one."""

from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.recipes import NEIGHBORS, RECIPES, TABLE
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.user_error import UserError

RUN = """\
run.id = "test"
model.path = "m"
tasks.environments = {{ lookup = 1.0 }}
[learner]
versions = 3
{more}
"""


def learner(folder: Path, more: str, *flags: str) -> LearnerConfig:
    path = folder / "run.toml"
    path.write_text(RUN.format(more=more))
    return load([str(path), *flags], {}, program="").config.learner


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_run_that_reads_back_from_the_output_of_check(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(more=f'recipe = "{name}"'))
    config = load([str(path)], {}, program="").config
    assert config.learner.proximal.kind == RECIPES[name]["proximal"]["kind"]
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load([str(tmp_path / "again.toml")], {}, program="").config == config


def test_the_rows_of_the_unifying_table_differ_in_their_treatment_of_both_ratios() -> None:
    rows = {(r["proximal"]["kind"], r["discrepancy"]["weight"], r["discrepancy"]["band"]) for r in TABLE.values()}
    assert len(rows) == len(TABLE) == 7


def test_two_rows_drop_the_discrepancy_and_two_surrogates_share_it(tmp_path: Path) -> None:
    """Section 2.4: PPO-clip has r_d = 1 and an exact proximal; decoupled_exact weights and masks by r_d."""
    plain, decoupled = learner(tmp_path, 'recipe = "ppo_clip"'), learner(tmp_path, 'recipe = "decoupled_exact"')
    assert plain.proximal == decoupled.proximal
    assert (plain.discrepancy.weight, plain.discrepancy.band) == ("off", "off")
    assert (decoupled.discrepancy.weight, decoupled.discrepancy.band) == ("ratio", 2.0)


def test_keys_of_the_run_override_the_recipe(tmp_path: Path) -> None:
    config = learner(tmp_path, 'recipe = "vcpo"\nloss.clip_high = 0.5', "--learner.discrepancy.weight_high=4.0")
    assert (config.loss.clip_high, config.loss.objective) == (0.5, "policy_gradient")
    assert (config.discrepancy.weight_high, config.discrepancy.weight_level) == (4.0, "sequence")
    assert config.vcpo.baseline


def test_another_kind_of_proximal_has_its_own_keys(tmp_path: Path) -> None:
    recipe = next(name for name, keys in NEIGHBORS.items() if keys["proximal"]["kind"] == "ppo_ewma_async")
    config = learner(tmp_path, f'recipe = "{recipe}"\nproximal = {{ kind = "ewma_prox", decay = 0.5 }}')
    assert config.proximal.model_dump() == {"kind": "ewma_prox", "decay": 0.5}


def test_a_recipe_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe 'icepob'; did you mean icepop"):
        learner(tmp_path, 'recipe = "icepob"')


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--learner.discrepancy.veto=of", "learner.discrepancy.veto: input should be a valid number, or be 'off', got"),
        ("--learner.discrepancy.band=0.5", "learner.discrepancy.band: input should be greater than 1, or be 'off'"),
        ("--learner.discrepancy.tokens=[3.0, 2.0]", "it must satisfy 0 <= low < high, or be 'off'"),
    ],
)
def test_an_invalid_switch_is_reported_with_the_value_for_off(flag: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        learner(tmp_path, "", flag)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_key_of_the_proximal_alone_means_the_default_kind(tmp_path: Path) -> None:
    assert learner(tmp_path, "", "--learner.proximal.prefetch=true").proximal.kind == "snapshot"
    with pytest.raises(
        UserError, match=r'learner\.proximal\.decay is not a key of learner\.proximal with kind = "snapshot"'
    ):
        learner(tmp_path, "", "--learner.proximal.decay=0.5")
    chosen = learner(tmp_path, 'recipe = "ppo_ewma"', "--learner.proximal.decay=0.5").proximal
    assert chosen.model_dump() == {"kind": "ewma_prox", "decay": 0.5}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--learner.proximal.kind=linear_prox", "--learner.discrepancy.m2=0.04"],
            "is computed in each forward pass: choose another",
        ),
        (["--learner.even_groups=skip", "--learner.advantages.kind=gae"], 'set even_groups = "keep"'),
        (["--learner.vcpo.baseline=true"], 'it needs loss.objective = "policy_gradient", not "clipped"'),
        (["--learner.recipe=vcpo", "--learner.advantages.kind=gae"], 'advantages.kind = "gae" would have no effect'),
        (["--learner.recipe=vcpo", "--learner.loss.entropy=0.008"], "it needs loss.entropy = 0, not 0.008"),
        (["--learner.loss.kl={weight = 0.1, place = \"reward\"}"], "choose one of reinforce_pp"),
        (["--learner.audit.fraction=0.1"], 'proximal.kind = "snapshot" is exact: set audit.fraction to 0'),
        (["--learner.discrepancy={weight = \"clipped\", weight_low = 3.0}"], "is greater than weight_high (2.0)"),
    ],
)  # fmt: skip
def test_incompatible_keys_are_refused_with_a_compatible_choice(
    flags: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        learner(tmp_path, "", *flags)
    assert sentence in str(error.value)
