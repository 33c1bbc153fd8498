"""The launcher of several ranks exits with the code of its ranks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.torchrun import SHUTDOWN_S, exit_code, main

LIMIT_S = 300


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        pytest.param([(10, 1)], 1, id="a crash"),
        pytest.param([(10, 5), (11, 1)], 5, id="a rank crashes after a documented error of another"),
        pytest.param([(10, 1), (10, 6)], 6, id="a rank crashes in the same second as the documented error"),
        pytest.param([(10, -9), (11, 1)], 137, id="SIGKILL"),
        pytest.param([(10, -15), (10, -9)], 137, id="the launcher ended the other rank in the same second"),
        pytest.param([(12, 1), (11, -15)], 143, id="the earliest failure counts"),
        pytest.param([(10, 130), (10, 130)], 130, id="stopped"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_ended_the_others(
    failures: list[tuple[int, int]], expected: int
) -> None:
    assert exit_code(failures) == expected


def test_the_ranks_may_finish_a_long_step_unless_the_user_limits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run as torchrun

    launched: list[Any] = []
    monkeypatch.setattr(torchrun, "run", launched.append)
    assert main(["-m", "a.module"]) == main(["--shutdown-timeout=5", "-m", "a.module"]) == ExitCode.DONE
    assert [options.shutdown_timeout for options in launched] == [SHUTDOWN_S, 5]


def test_restarts_of_several_nodes_need_a_rendezvous_that_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ("--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=1", "--max-restarts=3")
    assert main([*nodes, "-m", "a.module"]) == ExitCode.CONFIGURATION
    assert "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT" in capsys.readouterr().err


@pytest.mark.servers
def test_an_error_of_the_configuration_ends_the_launcher_with_its_code(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('model.path = "none"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n')
    launcher = ("-m", "palimpsest.services.learner.torchrun", "--standalone", "--nproc-per-node=2")
    ended = subprocess.run(
        [sys.executable, *launcher, f"--log-dir={tmp_path}", "-m", "palimpsest.services.learner", str(run)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == ExitCode.CONFIGURATION, ended.stderr
    assert "run.id is empty" in ended.stderr
