"""`palimpsest eval`: its command line, its table, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.user_error import UserError
from palimpsest.eval_command import USAGE, command, parse, run, table


def test_flags_of_the_command_and_configuration_keys_are_told_apart() -> None:
    request = parse(["runs/a", "--version", "3", "--tasks=8", "--rollout.max_live=4", "--sampling.max_turns", "2"])
    assert request.place == "runs/a"
    assert request.own == {"version": "3", "tasks": "8"}
    assert request.flags == ["--rollout.max_live=4", "--sampling.max_turns=2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: palimpsest eval RUN"),
        (["a", "b"], "takes one run or model; got a and b"),
        (["a", "--samples"], "--samples needs a value"),
        (["a", "--speed=3"], "there is no such flag"),
    ],
)
def test_an_unusable_command_line_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_a_folder_that_is_neither_run_nor_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither the folder of a run \(no run.toml\) nor a model \(no config.json\)"):
        run(parse([str(tmp_path), "--environments=add"]), {})


def test_a_model_needs_environments_and_has_no_versions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="name the environments"):
        run(parse([str(tmp_path)]), {})
    with pytest.raises(UserError, match="which has no versions"):
        run(parse([str(tmp_path), "--version=3"]), {})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tasks=0", "--tasks 0: must be a whole number of at least 1"),
        ("--samples=x", "--samples x: must be a whole number"),
        ("--seed=-1", "--seed -1: must be a whole number of at least 0"),
        ("--temperature=0", "--temperature 0: must be a number of at least 0.01 and at most 100"),
        ("--temperature=1e300", "--temperature 1e300: must be a number of at least 0.01 and at most 100"),
        ("--temperature=inf", "--temperature inf: must be"),
        ("--temperature=nan", "--temperature nan: must be"),
        ("--temperature=hot", "--temperature hot: must be"),
        ("--tasks=10001", "--tasks 10001: must be a whole number of at least 1 and at most 10000"),
        ("--samples=1001", "at most 1000"),
        (f"--seed={'9' * 5000}", "must be a whole number"),
        ("--environments=lokup", "did you mean lookup"),
        ('--environments=lo"kup', "there is no environment 'lo\"kup'"),
        ("--environments=lookup,add,lookup", "lookup is there twice"),
        ("--model.path=elsewhere", "the model is this folder, of no run"),
        ("--run.id=first", "the model is this folder, of no run"),
        ("--rollout.engine.kind=scripted", r"^palimpsest eval \S+: rollout.engine.texts is missing"),
    ],
)
def test_an_unusable_number_or_name_is_refused(flag: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        run(parse([str(tmp_path), "--environments=lookup", flag]), {})


@pytest.mark.parametrize("name", ["", "folder", "a_file/result.json"])
def test_a_result_that_cannot_be_written_is_refused_before_the_evaluation(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a_file").touch()
    with pytest.raises(UserError, match="json"):
        command([str(tmp_path), f"--json={tmp_path / name if name else ''}"])


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="owner/model: no such folder: name the folder of a run"):
        run(parse(["owner/model", "--environments=add"]), {})


def test_the_table_has_one_row_for_each_environment() -> None:
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    environment = {
        "tasks": 2, "samples": 4, "k": 2, "avg": estimate, "passed": None, "reward": None, "short": 2,
    }  # fmt: skip
    result: dict[str, Any] = {
        "model": "m", "run": "first", "version": 3, "tasks": 2, "k": 2, "temperature": 0.7, "seconds": 5.0,
        "evaluation": {"add": environment}, "sampled_tokens": 1234,
        "trajectories": {"offered": 4, "scored": 3, "dropped": {"environment_failed": 1}},
    }  # fmt: skip
    assert list(table(result)) == [
        "version 3 of run first, 2 tasks of each environment, temperature 0.7",
        "",
        "environment  avg@2                 pass@2   reward",
        "add          0.500 [0.250, 0.750]  unknown  unknown",
        "",
        "3 of 4 trajectories scored, 1,234 tokens sampled in 5 s",
        "  dropped as environment_failed: 1",
    ]


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command(["--help"])
    assert capsys.readouterr().out == USAGE + "\n"
