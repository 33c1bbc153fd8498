"""The message of every error in a configuration."""

from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.user_error import UserError
from tests.unit.common.config_files import NOTHING, RUN, loaded, refused


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("learner.versions=3.5", "input should be a valid integer, got 3.5"),
        ("learner.versions=true", "input should be a valid integer, got True"),
        ("learner.versions=three", "input should be a valid integer, got 'three'"),
        ("learner.versions=0", "input should be greater than 0, got 0"),
        ("learner.record=yes", "input should be a valid boolean, got 'yes'"),
        ("learner.record=1", "input should be a valid boolean, got 1"),
        ("learner.optimizer.lr=nan", "input should be greater than 0, got nan"),
        ("learner.optimizer.lr=true", "input should be a valid number, got True"),
        ("learner.loss.clip_low=1.5", "input should be less than or equal to 1, got 1.5"),
        ("snapshot_store.port=70000", "input should be less than or equal to 65535, got 70000"),
        ("model.attention=flash", "input should be 'sdpa', 'eager' or 'flash_attention_2', got 'flash'"),
        ("tasks.environments.add=0", "input should be greater than 0, got 0"),
        ("rollout.worker=Worker 1", "string should match pattern '^[a-z0-9][a-z0-9_-]{0,31}$', got 'Worker 1'"),
    ],
)
def test_an_invalid_value_is_reported_with_its_layer_key_and_valid_values(run: Path, flag: str, message: str) -> None:
    key, _, value = flag.partition("=")
    assert refused(run, f"--{flag}") == f"--{key}: {key}: {message}"
    variable = "PALIMPSEST_" + key.upper().replace(".", "__")
    assert refused(run, **{variable: value}) == f"{variable}: {key}: {message}"


def test_an_invalid_value_in_the_file_names_the_file(run: Path) -> None:
    message = refused(run, more="[learner.optimizer]\nlr = 'fast'\n")
    assert message == f"{run}: learner.optimizer.lr: input should be a valid number, got 'fast'"


def test_an_invalid_value_inside_a_table_names_the_flag_that_set_the_table(run: Path) -> None:
    message = refused(run, "--tasks.environments={ hop = 1.0, add = 'x' }")
    assert message == "--tasks.environments: tasks.environments.add: input should be a valid number, got 'x'"


def test_an_invalid_item_of_a_list_names_the_flag_that_set_the_list(run: Path) -> None:
    message = refused(run, "--rollout.engine.kind=scripted", '--rollout.engine.texts=["a", 3]')
    assert message == "--rollout.engine.texts: rollout.engine.texts.1: input should be a valid string, got 3"


def test_all_problems_are_reported_at_once(run: Path) -> None:
    message = refused(run, "--learner.versions=-1", "--learnr.lr=3", more="[sampling]\nmax_turns = 0\n")
    assert sorted(line.split(":")[0] for line in message.splitlines()) == [
        "--learner.versions",
        "--learnr.lr",
        str(run),
    ]


def test_top_p_below_1_is_refused_with_the_reason(run: Path) -> None:
    message = refused(run, "--sampling.top_p=0.9")
    assert message.startswith("--sampling.top_p: sampling.top_p: 0.9 cannot be used for training: ")
    assert "log-probs" in message
    assert message.endswith("Set it to 1.0")


def test_a_temperature_that_the_engine_would_raise_is_refused(run: Path) -> None:
    assert loaded(run, "--sampling.temperature=0.01").sampling.temperature == 0.01
    message = refused(run, "--sampling.temperature=0.009")
    assert message.startswith("--sampling.temperature: sampling.temperature: 0.009 cannot be used for training: vLLM ")
    assert message.endswith("Set it to at least 0.01")


def test_top_k_on_is_refused_with_the_reason(run: Path) -> None:
    message = refused(run, PALIMPSEST_SAMPLING__TOP_K="50")
    assert message.startswith("PALIMPSEST_SAMPLING__TOP_K: sampling.top_k: 50 cannot be used for training")
    assert "log-probs" in message
    assert message.endswith("Set it to 0")


def test_a_turn_that_leaves_no_room_for_a_prompt_is_refused(run: Path) -> None:
    message = refused(run, "--sampling.max_turn_tokens=4096", "--sampling.max_trajectory_tokens=4096")
    assert "sampling.max_turn_tokens (4096) leaves no room" in message
    assert "sampling.max_trajectory_tokens (4096)" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--env_gateway.lease_s=601",),
            "--env_gateway.lease_s: env_gateway.lease_s (601.0) is more than tasks.time_limit_s (600.0): ",
        ),
        (
            ("--tasks.time_limit_s=59.5",),
            "--tasks.time_limit_s: env_gateway.step_limit_s (60.0) is more than tasks.time_limit_s (59.5): ",
        ),
        (
            ("--env_gateway.remember_s=9",),
            "--env_gateway.remember_s: env_gateway: env_gateway.remember_s (9.0) is less than env_gateway.step_limit_s",
        ),
    ],
)
def test_time_limits_that_contradict_each_other_are_refused(run: Path, flags: tuple[str, ...], message: str) -> None:
    assert refused(run, *flags).startswith(message)


def test_more_turns_than_a_session_permits_are_refused(run: Path) -> None:
    message = "sampling.max_turns (65) is more than env_gateway.session_turns (64): sessions would end earlier"
    assert message in refused(run, "--sampling.max_turns=65")
    assert loaded(run, "--sampling.max_turns=65", "--env_gateway.session_turns=65").sampling.max_turns == 65


def test_the_lease_of_a_session_follows_the_time_limit_of_its_group(run: Path) -> None:
    assert loaded(run).session_lease_s == 600.0
    assert loaded(run, "--tasks.time_limit_s=90").session_lease_s == 90.0
    assert loaded(run, "--tasks.time_limit_s=90", "--env_gateway.lease_s=30").session_lease_s == 30.0


def test_more_minibatches_than_groups_are_refused(run: Path) -> None:
    assert "learner.minibatches (33) is more than learner.groups_per_batch (32)" in refused(
        run, "--learner.minibatches=33"
    )


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sampling.temprature", "sampling.temperature"),
        ("learner.optimiser.lr", "learner.optimizer"),
        ("learnr.versions", "learner"),
        ("learner.max_stalenes", "learner.max_staleness"),
        ("snapshotstore.port", "snapshot_store"),
        ("rollout.engine.kv_cache_gb", "rollout.engine.kv_cache_gib"),
        ("seed", "run.seed"),
        ("optimizer.lr", "learner.optimizer.lr"),
        ("learner.kl.weight", "learner.loss.kl.weight"),
        ("learner.lr", "learner.optimizer.lr or learner.advantages.critic.lr"),
    ],
)
def test_a_misspelled_key_is_reported_with_the_nearest_one(run: Path, key: str, near: str) -> None:
    assert refused(run, f"--{key}=1").splitlines()[0].endswith(f"; did you mean {near}?")
    variable = "PALIMPSEST_" + key.upper().replace(".", "__")
    assert refused(run, **{variable: "1"}).startswith(f"{variable}: ")


def test_a_misspelled_key_in_the_file_is_reported_with_the_file_and_the_nearest_key(run: Path) -> None:
    message = refused(run, more="[sampling]\ntemprature = 1.0\n")
    assert message == f"{run}: sampling.temprature is not a key of [sampling]; did you mean sampling.temperature?"


def test_a_misspelled_section_in_the_file_is_reported_with_the_nearest_one(run: Path) -> None:
    assert refused(run, more="[sampler]\n") == f"{run}: sampler is not a key of a run; did you mean sampling?"


def test_a_key_without_a_near_match_is_reported_with_all_keys(run: Path) -> None:
    assert refused(run, "--logs.xyzzy=1") == "--logs.xyzzy: logs.xyzzy is not a key of [logs]; it has format, level"


def test_a_key_below_a_plain_value_is_refused(run: Path) -> None:
    assert refused(run, "--model.path.x=1") == "--model.path.x: model.path.x is not a key: model.path has none"


def test_a_key_of_another_union_member_is_reported_with_the_keys_of_this_one(run: Path) -> None:
    message = refused(run, "--learner.proximal.kind=ewma_prox", "--learner.proximal.window=3")
    assert message == (
        "--learner.proximal.window: learner.proximal.window is not a key of learner.proximal with "
        'kind = "ewma_prox" by --learner.proximal.kind; that has decay, kind'
    )
    message = refused(run, "--learner.proximal.kind=bypass", more="proximal = { kind = 'snapshot', prefetch = true }")
    assert message == (
        f"{run}: learner.proximal.prefetch is not a key of learner.proximal with "
        'kind = "bypass" by --learner.proximal.kind; that has kind'
    )


def test_a_key_of_no_union_member_is_reported_with_the_keys_of_all(run: Path) -> None:
    message = refused(run, "--rollout.engine.xyzzy=1")
    assert message.startswith(
        "--rollout.engine.xyzzy: rollout.engine.xyzzy is not a key of any kind of rollout.engine; "
    )
    assert message.endswith("they have amx, compile, expert_parallel, gpu_memory_utilization, kind, kv_cache_gib, "
                         "max_concurrent_tokens, sleep, tensor_parallel, texts, threads, tokens_per_s")  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("learner.proximal=bypass", "is a section, got 'bypass'; did you mean learner.proximal.kind?"),
        ("learner.advantages=grpo", "is a section, got 'grpo'; did you mean learner.advantages.kind?"),
        ("learner.audit=0.1", "is a section, got 0.1; its keys are fraction"),
        ("learner.vcpo=true", "is a section, got True; its keys are base, baseline, lr_scaling"),
    ],
)
def test_a_value_for_a_section_is_reported_with_its_keys(run: Path, flag: str, message: str) -> None:
    key = flag.partition("=")[0]
    assert refused(run, f"--{flag}") == f"--{key}: {key} {message}"


@pytest.mark.parametrize("value", ["0.5", "0.5,2", "[0.5]", "[0.5, 1, 2]", "{ low = 0.5, high = 2 }"])
def test_an_invalid_interval_is_reported_with_its_form(run: Path, value: str) -> None:
    message = refused(run, f"--learner.discrepancy.tokens={value}")
    key = "learner.discrepancy.tokens"
    assert message.startswith(f"--{key}: {key}: input should be two numbers, [low, high], or be 'off', got ")
    assert len(message.splitlines()) == 1


def test_an_invalid_end_of_an_interval_is_named_by_its_index(run: Path) -> None:
    message = refused(run, "--learner.discrepancy.tokens=['a', 2]")
    key = "learner.discrepancy.tokens"
    assert message == f"--{key}: {key}.0: input should be a valid number, got 'a'"


def test_an_invalid_name_in_a_table_is_reported_with_the_valid_ones(run: Path) -> None:
    message = refused(run, "--learner.discrepancy.estimates.k9_token=0.1")
    assert message.startswith(
        "--learner.discrepancy.estimates.k9_token: learner.discrepancy.estimates: there is no 'k9_token'; it can be "
        "'k1_token', 'k1_sequence_sum',"
    )


def test_contradicting_keys_name_the_flags_that_set_them(run: Path) -> None:
    run.write_text(RUN.replace("versions = 3", "versions = 3\nproximal.kind = 'bypass'"))
    flags = ("--learner.audit.fraction=0.1", "--learner.proximal.kind=snapshot", "--learner.threads=2")
    message = refused(run, *flags)
    assert message.startswith("--learner.audit.fraction and --learner.proximal.kind: learner: audit.fraction compares")
    assert refused(run, "--learner.minibatches=33").startswith("--learner.minibatches: learner.minibatches (33)")
    more = "[learner.discrepancy]\nweight = 'clipped'\nweight_low = 3.0\n"
    assert refused(run, more=more).startswith(f"{run}: learner.discrepancy: weight_low (3.0)")


def test_an_unknown_union_member_is_reported_with_the_known_ones(run: Path) -> None:
    message = refused(run, "--rollout.engine.kind=sglang")
    assert message == "--rollout.engine.kind: rollout.engine.kind: there is no 'sglang'; it can be 'vllm', 'scripted'"


def test_an_unknown_member_of_a_union_in_the_file_names_the_file(run: Path) -> None:
    message = refused(run, more="[rollout.engine]\nkind = 'sglang'\n")
    assert message == f"{run}: rollout.engine.kind: there is no 'sglang'; it can be 'vllm', 'scripted'"


def test_keys_of_a_union_without_its_kind_are_reported(run: Path) -> None:
    message = refused(run, more="[rollout.engine]\nkv_cache_gib = 1.0\n")
    assert message == f"{run}: rollout.engine.kind is missing; it decides which other keys are valid"


def test_a_key_missing_from_the_file_is_named(run: Path) -> None:
    run.write_text(RUN.replace("versions = 3", ""))
    assert refused(run) == f"{run}: learner.versions is missing"


def test_a_section_missing_from_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    assert refused(path).splitlines() == [f"{path}: {name} is missing" for name in ("model", "tasks", "learner")]


def test_a_plain_value_in_place_of_a_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace("[learner]\nversions = 3", "").replace("[run]", "learner = 3\n[run]"))
    assert "learner is already set to 3, which has no keys" in refused(path, "--learner.versions=3")


def test_a_missing_file_is_named_with_an_example_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: no such file\. Start from a copy of examples/embedded\.toml"):
        load([str(tmp_path / "none.toml")], NOTHING, program="prog")


def test_invalid_toml_is_named_with_its_line(run: Path) -> None:
    run.write_text("[run]\nid = = 3")
    assert refused(run).startswith(f"{run}: invalid TOML: ")
    assert "line 2" in refused(run)


def test_a_file_that_is_not_text_is_refused(run: Path) -> None:
    run.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load([str(run)], NOTHING, program="prog")


def test_a_folder_is_refused_and_a_runs_own_names_the_file_in_it(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load([str(tmp_path)], NOTHING, program="prog")
    assert str(error.value) == f"{tmp_path} is a folder; the run file in it is {run}"
    run.unlink()
    with pytest.raises(UserError, match="is a folder; name a run file"):
        load([str(tmp_path)], NOTHING, program="prog")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["run.toml", "--help"]])
def test_no_file_and_a_help_flag_give_the_usage(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"^usage: prog RUN\.toml \[--check\]"):
        load(arguments, NOTHING, program="prog")


def test_two_files_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="expected one run file"):
        load([str(run), "other.toml"], NOTHING, program="prog")


def test_a_flag_without_a_value_is_refused(run: Path) -> None:
    assert refused(run, "--run.seed") == "--run.seed needs a value: --run.seed=VALUE"
    assert refused(run, "--quiet").startswith("--quiet: quiet is not a key of a run")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ('{ kind = "ors", urll = "x" }', "urll is not a key of [env_gateway.adapters.math]; did you mean"),
        ('{ kind = "ors", folder = "x" }', "folder is not a key of [env_gateway.adapters.math]; it has action_field, "),
        ('{ kind = "ors", rank = 3 }', "rank is not a key of [env_gateway.adapters.math]; it has action_field, "),
        ('{ kind = "orz" }', "kind: input should be 'mcp', 'ors'"),
        ('{ url = "x" }', "kind is missing"),
        ('{ kind = "ors", reward_range = [1.0, 1.0] }', "the first number must be less than the second"),
    ],
)
def test_keys_of_an_adapter_are_checked(run: Path, adapter: str, message: str) -> None:
    refusal = refused(run, f"--env_gateway.adapters={{ math = {adapter} }}")
    assert refusal.startswith("--env_gateway.adapters: env_gateway.adapters.math")
    assert message in refusal


def test_a_starting_adapter_needs_a_rank(run: Path) -> None:
    loaded(run, "--learner.lora.start=first", "--learner.lora.rank=4")
    assert 'start = "first" needs a rank' in refused(run, "--learner.lora.start=first")


def test_what_sharding_supports_is_accepted(run: Path) -> None:
    baseline = ("--learner.vcpo.baseline=true", "--learner.loss.objective=policy_gradient")
    for sharding in ("full", "hybrid"):
        loaded(run, f"--learner.sharding={sharding}", *baseline)
    loaded(run, "--learner.sharding=full", "--learner.lora.rank=4", "--learner.publishing=background")


def test_ranks_share_rows_only_where_they_compute_what_one_rank_would(run: Path) -> None:
    shared = ("--learner.context_parallel=2", "--learner.sharding=full", "--learner.layout=packed")
    loaded(run, *shared)
    for other in ("--learner.sharding=none", "--learner.layout=padded", "--learner.sharding=hybrid"):
        assert 'context_parallel = 2 needs sharding = "full" and layout = "packed"' in refused(run, *shared, other)
    loaded(run, *shared, "--learner.proximal.kind=ewma_prox")
    loaded(run, *shared, "--learner.advantages.kind=gae", "--learner.lora.rank=4")
    message = refused(run, *shared, "--model.attention=flash_attention_2")
    assert 'learner.context_parallel = 2 needs model.attention = "sdpa"' in message
