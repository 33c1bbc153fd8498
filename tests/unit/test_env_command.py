"""`palimpsest env`: the list of environments, and the first prompt of a task."""

from pathlib import Path

import pytest

from palimpsest.common.environments.lookup import Lookup
from palimpsest.common.environments.reasoning_gym_tasks import DATASETS
from tests.processes.programs import ProgramResult, run_program

PLUGIN = '''
from palimpsest.env import Message, Opening, Score

class Greet:
    """Greet back."""
    version = "7"
    def reset(self, seed):
        if seed == 13:
            raise ValueError("unlucky")
        return Opening((Message(role="user", content=f"hello {seed}"),))
    def step(self, turn):
        return Score(1.0, True)
    def finalize(self):
        return Score(0.0, False)
    def state_hash(self):
        return ""
'''


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file with a plugged-in environment and a missing model."""
    (tmp_path / "greetings.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "mine.toml"
    path.write_text(
        'model.path = "nowhere"\ntasks.environments = { greet = 1.0 }\n'
        'env_gateway.plugins = { greet = "greetings:Greet" }\nlearner.versions = 1\n'
    )
    return path


def env(*arguments: object) -> ProgramResult:
    return run_program("palimpsest", "env", *arguments)


def test_built_in_environments_are_listed_with_a_description() -> None:
    done = env("list")
    assert (done.code, done.err) == (0, "")
    for name, about in (("lookup", "ask a table for a key's value"), ("hop", ""), ("add", "have a sum calculated")):
        assert any(line.split()[:1] == [name] and about in line for line in done.out.splitlines())
    assert set(DATASETS) <= set(done.out.split())
    assert "tasks.environments" in done.out


def test_environments_of_a_run_file_are_listed_with_their_class(run_file: Path) -> None:
    (line,) = [line for line in env("list", run_file).out.splitlines() if line.split()[:1] == ["greet"]]
    assert line.split(maxsplit=1)[1] == "Greet back. (greetings:Greet, version 7)"


def test_a_task_is_shown_with_its_tools() -> None:
    output = env("show", "lookup", "--seed", "3").out
    assert Lookup().reset(3).messages[0].content in output
    assert '"name": "lookup"' in output
    assert env("show", "lookup", "--seed=3").out == output


def test_a_task_of_a_plugged_in_environment_is_shown(run_file: Path) -> None:
    done = env("show", "greet", run_file, "--seed=5")
    assert done.code == 0
    assert done.out.startswith("[user]\nhello 5\n")
    assert "The prompt cannot be rendered, so its parts are printed: model.path" in done.out


@pytest.mark.thorough
def test_a_task_is_rendered_with_the_chat_template_of_the_model(tmp_path: Path, starting_model: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'model.path = "{starting_model}"\ntasks.environments = {{ lookup = 1.0 }}\nlearner.versions = 1\n')
    output = env("show", "lookup", path).out
    assert output.startswith("<|im_start|>")
    assert output.rstrip().endswith("<|im_start|>assistant")
    assert Lookup().reset(0).messages[0].content in output


def test_a_task_that_cannot_begin_is_reported_with_its_error(run_file: Path) -> None:
    done = env("show", "greet", run_file, "--seed=13")
    assert done.code == 2
    assert done.err == ("environment greet, seed 13: the task cannot start (environment_raised): ValueError: unlucky\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["show", "lokup"], "did you mean lookup?"),
        (["show"], "usage: palimpsest env"),
        (["show", "lookup", "--seed=x"], "--seed x: must be an integer of at least 0"),
        (["show", "lookup", f"--seed={'9' * 5000}"], "with at most 18 digits"),
        (["check", "guess:"], "'guess:' is not of the form MODULE:CLASS"),
        (["shoe"], "palimpsest env shoe: unknown action; use `list`, `show`, `check`, `play`"),
        (["list", "nowhere.toml"], "nowhere.toml"),
        (["check", "nowhere:Env"], "nowhere:Env cannot be used: ModuleNotFoundError"),
        (["play", "lokup"], "did you mean lookup?"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], error: str) -> None:
    done = env(*arguments)
    assert (done.code, done.out) == (2, "")
    assert error in done.err
