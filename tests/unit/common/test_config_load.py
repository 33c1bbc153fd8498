"""Loading a configuration from files, environment, and flags."""

import re
from pathlib import Path

import pytest

from palimpsest.common.config import Invocation, load
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.user_error import UserError
from tests.unit.common.config_files import NOTHING, RUN, loaded, refused

ROOT = Path(__file__).parents[3]


def test_a_key_that_no_layer_sets_has_its_default(run: Path) -> None:
    assert loaded(run).learner.optimizer.lr == 1e-6


def test_toml_overrides_defaults(run: Path) -> None:
    run.write_text(RUN + "[learner.optimizer]\nlr = 1e-5\n")
    assert loaded(run).learner.optimizer.lr == 1e-5


def test_the_environment_overrides_toml(run: Path) -> None:
    run.write_text(RUN + "[learner.optimizer]\nlr = 1e-5\n")
    assert loaded(run, PALIMPSEST_LEARNER__OPTIMIZER__LR="2e-5").learner.optimizer.lr == 2e-5


def test_flags_override_the_environment(run: Path) -> None:
    run.write_text(RUN + "[learner.optimizer]\nlr = 1e-5\n")
    config = loaded(run, "--learner.optimizer.lr=3e-5", PALIMPSEST_LEARNER__OPTIMIZER__LR="2e-5")
    assert config.learner.optimizer.lr == 3e-5


def test_the_last_of_two_equal_flags_applies(run: Path) -> None:
    assert loaded(run, "--run.seed=1", "--run.seed=2").run.seed == 2


def test_a_variable_for_a_key_overrides_one_for_its_section(run: Path) -> None:
    config = loaded(run, PALIMPSEST_TASKS__ENVIRONMENTS="{ hop = 1.0 }", PALIMPSEST_TASKS__ENVIRONMENTS__ADD="2.0")
    assert config.tasks.environments == {"hop": 1.0, "add": 2.0}


def test_variables_without_the_prefix_are_ignored(run: Path) -> None:
    config = loaded(run, RUN__SEED="7", PALIMPSEST_FAULT="learner.after_publish:3", PALIMPSEST_SERVICE_TOKEN="secret")
    assert config.run.seed == 0


def test_every_documented_variable_can_be_set(run: Path) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.toml")]
    named = {name for page in pages for name in re.findall(r"PALIMPSEST_\w+[A-Z]", page.read_text())}
    assert {"PALIMPSEST_CACHE", "PALIMPSEST_SERVICE_TOKEN", "PALIMPSEST_KAFKA_PASSWORD"} <= named
    loaded(run, **{name: "5" for name in named if "__" not in name})


def test_a_flag_takes_its_value_after_a_space(run: Path) -> None:
    assert loaded(run, "--run.seed", "5").run.seed == 5


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model.path=17", "17"),
        ("--model.path=true", "true"),
        ("--model.path=a b", "a b"),
        ('--model.path="quoted"', '"quoted"'),
    ],
)
def test_a_flag_for_a_string_is_taken_verbatim(run: Path, flag: str, value: str) -> None:
    assert loaded(run, flag).model.path == value


def test_a_flag_for_a_path_is_taken_verbatim(run: Path) -> None:
    assert loaded(run, "--bus.path=3").bus.path == Path("3")


@pytest.mark.parametrize(
    ("value", "expected"), [("false", False), ("3", 3), ("0.5", 0.5), ("plain words", "plain words"), ('"3"', "3")]
)
def test_a_flag_for_a_chat_template_option_keeps_its_type(run: Path, value: str, expected: object) -> None:
    found = loaded(run, f"--model.chat_template_options.enable_thinking={value}").model.chat_template_options
    assert found == {"enable_thinking": expected}
    assert type(found["enable_thinking"]) is type(expected)


def test_a_flag_may_set_a_table(run: Path) -> None:
    assert loaded(run, "--tasks.environments={ hop = 2, add = 1.5 }").tasks.environments == {"hop": 2.0, "add": 1.5}


def test_a_flag_may_choose_a_member_of_a_union(run: Path) -> None:
    engine = loaded(run, "--rollout.engine.kind=scripted", '--rollout.engine.texts=["a", "b"]').rollout.engine
    assert engine == ScriptedEngineConfig(kind="scripted", texts=("a", "b"))


def test_an_integer_is_a_number(run: Path) -> None:
    assert loaded(run, "--sampling.temperature=2").sampling.temperature == 2.0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PALIMPSEST_STORE_SERVICE_HOST", "10.0.0.7"),
        ("PALIMPSEST_STORE_SERVICE_PORT", "8200"),
        ("PALIMPSEST_STORE_SERVICE_PORT_HTTP", "8200"),
        ("PALIMPSEST_STORE_PORT", "tcp://10.0.0.7:8200"),
        ("PALIMPSEST_STORE_PORT_8200_TCP", "tcp://10.0.0.7:8200"),
        ("PALIMPSEST_STORE_PORT_8200_TCP_ADDR", "10.0.0.7"),
        ("PALIMPSEST_LEARNER_PORT_53_UDP_PROTO", "udp"),
    ],
)
def test_the_service_links_of_kubernetes_are_not_keys(run: Path, variable: str, value: str) -> None:
    assert loaded(run, **{variable: value}) == loaded(run)


def test_a_port_is_still_a_key_and_a_misspelled_variable_is_still_refused(run: Path) -> None:
    assert loaded(run, PALIMPSEST_LEARNER__PORT="8123").learner.port == 8123
    with pytest.raises(UserError, match="PALIMPSEST_LEARNER_VERSIONS"):
        loaded(run, PALIMPSEST_LEARNER_VERSIONS="3")


def test_flags_that_set_keys_are_kept_for_child_processes(run: Path) -> None:
    found = load([str(run), "--run.seed", "5", "--check", "--run.id=x"], NOTHING, program="prog")
    assert found == Invocation(found.config, run, check=True, overrides=("--run.seed=5", "--run.id=x"))


def test_resume_alone_reads_the_runs_own_file(run: Path) -> None:
    found = load(["--resume", str(run.parent)], NOTHING, program="prog")
    assert (found.source, found.resume, found.config.run.id) == (run.parent / "run.toml", run.parent, "first")


def test_a_configuration_cannot_be_changed(run: Path) -> None:
    config = loaded(run)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]


OLD_KEY = "learner.discrepancy.weight_normalise"


def test_a_key_that_was_renamed_is_taken_under_its_old_name(run: Path) -> None:
    assert loaded(run, f"--{OLD_KEY}=true").learner.discrepancy.weight_normalize is True
    variable = {f"PALIMPSEST_{OLD_KEY.upper().replace('.', '__')}": "true"}
    assert loaded(run, **variable).learner.discrepancy.weight_normalize is True
    run.write_text(f"{RUN}[learner.discrepancy]\n{OLD_KEY.rpartition('.')[2]} = true\n")
    assert loaded(run).learner.discrepancy.weight_normalize is True
    assert loaded(run, "--learner.discrepancy.weight_normalize=false").learner.discrepancy.weight_normalize is False


def test_a_key_under_both_its_names_is_refused(run: Path) -> None:
    message = refused(
        run, more=f"[learner.discrepancy]\n{OLD_KEY.rpartition('.')[2]} = true\nweight_normalize = false\n"
    )
    assert (
        f"{OLD_KEY} is the old name of learner.discrepancy.weight_normalize, which is also set: remove the old one"
        in message
    )
