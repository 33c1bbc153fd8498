"""Errors of `palimpsest rescore` for runs that it cannot compare."""

import sys
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.rescore_command import command

RUN = 'run.id = "test"\nmodel.path = "none"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "records").mkdir()
    return tmp_path


def record(run: Path, *, versions: list[int], exact: bool = False) -> None:
    """Write a recorded batch of one row; a token of version -1 is not trainable."""
    row = np.asarray([versions])
    zeros = np.zeros(row.shape, np.float32)
    np.savez(
        run / "records" / "00000000.npz",
        now=0, tokens_0=row, versions_0=row, behavior_0=zeros, proximal_0=zeros, current_0=zeros,
        temperatures_0=zeros + 1, lengths_0=np.asarray([len(versions)]), first_0=True, exact_0=(row >= 0) & exact,
        passes_0=row * 0, trajectories_0=np.asarray(["g000000/0"]),
    )  # fmt: skip


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command, which must fail, and return the last line of its error output."""
    monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        command(sys.argv[1:])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_a_run_and_an_invalid_step_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        command([str(run / "records")])
    assert "--every 0: must be at least 1" in error_of(monkeypatch, capsys, run, "--every", "0")


def test_a_run_without_records_names_the_key_that_records(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(monkeypatch, capsys, run).endswith("holds no batch: record the run with learner.record = true")


def test_a_missing_version_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(run, versions=[-1, 4, 4], exact=True)
    error = error_of(monkeypatch, capsys, run)
    assert f"version 4, which sampled recorded tokens, is not in {run / 'snapshots'}: record" in error
    assert "learner.checkpoint.every = 1 and learner.checkpoint.keep = learner.versions" in error


def test_a_record_without_old_log_probs_is_not_compared(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(run, versions=[-1, -1])
    assert "has an old log-prob: the run used a surrogate" in error_of(monkeypatch, capsys, run)


@pytest.mark.parametrize("text", [b"run = [", b"\xff\xfe", b"run.id = 3\n"])
def test_a_damaged_run_file_is_named(run: Path, text: bytes) -> None:
    (run / "run.toml").write_bytes(text)
    with pytest.raises(UserError, match=r"run\.toml: "):
        command([str(run)])


@pytest.mark.parametrize("length", [0, 40, 1500])
def test_a_truncated_record_is_named(
    run: Path, length: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(run, versions=[-1, 4], exact=True)
    path = run / "records" / "00000000.npz"
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} is damaged (" in error_of(monkeypatch, capsys, run)


def test_a_damaged_manifest_of_a_version_is_named(run: Path) -> None:
    record(run, versions=[-1, 4], exact=True)
    (run / "snapshots" / "versions").mkdir(parents=True)
    (run / "snapshots" / "versions" / "00000004.json").write_text("{}")
    with pytest.raises(UserError, match=r"version 4 \(00000004\.json\): .* Restore the store from a copy") as error:
        command([str(run)])
    assert error.value.code is ExitCode.DAMAGED
