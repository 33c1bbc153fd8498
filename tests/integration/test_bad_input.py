"""User errors: each gives one clear message and its exit code, and no traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes.programs import run_program
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT, RunProcess, scripted

pytestmark = pytest.mark.thorough


def ended(module: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the program to its end. Returns its exit code and its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def refused(module: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Like `ended`, in this process: for errors before the program configures logs, signals or folders."""
    answer = run_program(module, *arguments, environment=environment)
    return answer.code, answer.out + answer.err


@pytest.fixture
def toml(tmp_path: Path, starting_model: Path) -> Path:
    return scripted(tmp_path, starting_model, versions=4)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port in use."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            "--learner.max_stalenes=2",
            "learner.max_stalenes is not a key of [learner]; did you mean learner.max_staleness?",
        ),
        ("--learner.versions=four", "learner.versions: input should be a valid integer, got 'four'"),
        ("--rollout.max_live=0", "rollout.max_live: input should be greater than 0, got 0"),
        ("--sampling.top_p=0.9", "sampling.top_p: 0.9 cannot be used for training: the engine would renormalize"),
        ("--sampling.top_k=20", "sampling.top_k: 20 cannot be used for training: the engine would renormalize"),
        ("--rollout.top_p=0.9", "rollout.top_p is not a key of [rollout]; did you mean sampling.top_p?"),
        ("--rollout.turns=4", "rollout.turns is not a key of [rollout]; it has "),
    ],
)
def test_an_invalid_flag_is_refused(toml: Path, flag: str, says: str) -> None:
    code, output = refused("palimpsest", "run", toml, flag)
    assert code == 2
    assert output.startswith(f"{flag.partition('=')[0]}: {says}")
    assert list(toml.parent.iterdir()) == [toml], "no run started"


def test_all_configuration_errors_are_listed_with_their_source(toml: Path) -> None:
    written = toml.read_text().replace("samples_per_group = 4", 'samples_per_group = "four"')
    toml.write_text(written.replace("max_turns", "max_turn"))
    code, output = refused(
        "palimpsest.services.learner",
        toml,
        "--learner.optimizer.lr=",
        environment={"PALIMPSEST_SAMPLING__TOP_P": "0.5"},
    )
    assert code == 2
    renormalized = next(line for line in output.splitlines() if "the engine would renormalize" in line)
    assert sorted(output.splitlines()) == [
        "--learner.optimizer.lr: learner.optimizer.lr: input should be a valid number, got ''",
        f"{toml}: sampling.max_turn is not a key of [sampling]; did you mean sampling.max_turns?",
        f"{toml}: tasks.samples_per_group: input should be a valid integer, got 'four'",
        renormalized,
    ]
    assert renormalized.startswith("PALIMPSEST_SAMPLING__TOP_P: sampling.top_p: 0.5 cannot be used for training: ")


def absent(folder: Path, _starting: Path) -> None:
    assert not folder.exists()


def empty(folder: Path, _starting: Path) -> None:
    folder.mkdir()


def garbage(folder: Path, starting: Path) -> None:
    shutil.copytree(starting, folder)
    (folder / "config.json").write_bytes(b"\x00\xff not JSON")


def with_an_added_token(folder: Path, starting: Path) -> None:
    shutil.copytree(starting, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|added|>"}))


def with_few_positions(folder: Path, starting: Path) -> None:
    shutil.copytree(starting, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 95}))


def without_tokenizer(folder: Path, starting: Path) -> None:
    shutil.copytree(starting, folder, ignore=shutil.ignore_patterns("tokenizer*"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (absent, "model.path: {model} does not exist: a complete model folder"),
        (empty, "model.path: {model} holds no model (there is no {model}/config.json): a complete model folder"),
        (garbage, "model.path: {model}/config.json cannot be read ("),
        (without_tokenizer, "model.path: {model} has no usable tokenizer (no tokenizer.json or its like): a complete"),
        (
            with_an_added_token,
            "model.path: the tokenizer of {model} has 288 tokens with ids up to 287, but the model's",
        ),
        (with_few_positions, "sampling.max_trajectory_tokens is 96, but the model in {model} has 95 positions"),
    ],
)
def test_an_unreadable_model_folder_is_refused(
    toml: Path, tmp_path: Path, starting_model: Path, make: Callable[[Path, Path], None], says: str
) -> None:
    model = tmp_path / "model"
    make(model, starting_model)
    code, output = refused("palimpsest", "run", toml, f"--model.path={model}")
    assert code == 2
    assert output.startswith(says.format(model=model))
    assert not (tmp_path / "scripted").exists(), "no run started"


@pytest.mark.servers
def test_a_model_without_a_chat_template_is_refused(toml: Path, tmp_path: Path, starting_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(starting_model, model, ignore=shutil.ignore_patterns("chat_template.jinja"))
    code, output = ended("palimpsest.services.rollout", toml, f"--model.path={model}")
    assert code == 2
    assert output.startswith(f"model.path: the tokenizer of {model} has no chat template")
    assert output.endswith("put a chat_template.jinja into the folder\n")


@pytest.mark.parametrize(
    "program",
    ["palimpsest", "palimpsest.services.rollout", "palimpsest.services.snapshot_store", "palimpsest.services.learner"],
)
def test_an_unwritable_run_folder_is_refused(toml: Path, program: str) -> None:
    """No user, not even root, can create a folder below a file."""
    command = ("run",) if program == "palimpsest" else ()
    code, output = ended(program, *command, toml, f"--run.folder={toml}")
    assert code == 2
    assert output.startswith(f"run.folder: cannot write to {toml}/scripted")
    assert "a part of that path is a file, not a folder. Choose another place with --run.folder=FOLDER" in output


@pytest.mark.servers
@pytest.mark.parametrize("service", ["snapshot_store", "env_gateway"])
def test_a_service_refuses_a_port_in_use(toml: Path, taken: int, service: str) -> None:
    code, output = ended(f"palimpsest.services.{service}", toml, f"--{service}.port={taken}")
    assert code == 3
    assert output.startswith(f"port {taken} on 127.0.0.1 is in use: stop the program that uses it")
    assert f"--{service}.port=PORT" in output


@pytest.mark.servers
def test_a_port_in_use_ends_the_run(toml: Path, taken: int) -> None:
    code, output = RunProcess(toml, f"--env_gateway.port={taken}", "--rollout.environments=gateway").finish()
    assert code == 3, output
    assert f"env_gateway: port {taken} on 127.0.0.1 is in use: stop the program that uses it" in output
    assert f"palimpsest run --resume {toml.parent / 'scripted'}" in output
    assert "Traceback" not in output


def test_a_folder_without_a_run_cannot_be_resumed(toml: Path, tmp_path: Path) -> None:
    for arguments in (("--resume", tmp_path), (toml, "--resume", tmp_path)):
        code, output = ended("palimpsest", "run", *arguments)
        assert (code, output) == (2, f"--resume {tmp_path}: not the folder of a run (it has no run.toml)\n")


def test_a_run_resumes_with_its_own_configuration_only(toml: Path, tmp_path: Path) -> None:
    home = tmp_path / "scripted"
    home.mkdir()
    code, resolved = ended("palimpsest", "run", toml, "--check")
    assert code == 0
    (home / "run.toml").write_text(resolved)
    code, output = ended(
        "palimpsest", "run", toml, "--resume", home, "--learner.optimizer.lr=0.5", "--tasks.samples_per_group=9"
    )
    assert code == 2
    assert output.splitlines() == [
        f"--resume {home}: the run has another configuration:",
        "  tasks.samples_per_group: 4 there, 9 here",
        "  learner.optimizer.lr: 0.0001 there, 0.5 here",
        "Use the run's values, leave out RUN.toml to resume with its own configuration, or start a new run",
    ]
    assert list(home.iterdir()) == [home / "run.toml"]
    code, output = ended("palimpsest", "run", toml)
    assert code == 2
    assert output.startswith(f"{home} already holds a run: continue it with --resume {home}, or choose another")
