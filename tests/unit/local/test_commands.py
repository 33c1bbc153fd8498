"""Command lines of the services, and their ports."""

import socket
from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.service import listen
from palimpsest.services.local.commands import Commands, free_port
from palimpsest.services.local.processes import Child, python
from palimpsest.services.local.supervisor import assign_ports

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


def learner(tmp_path: Path, *, ranks: int) -> Child:
    (tmp_path / "run.toml").write_text(RUN + f'run.folder = "{tmp_path}"\nlocal.learner_ranks = {ranks}\n')
    config, flags = assign_ports(load([str(tmp_path / "run.toml")], {}, program="").config)
    return Commands(config, tmp_path / "run.toml", flags).learner()


def test_one_rank_starts_without_torchrun(tmp_path: Path):
    alone = learner(tmp_path, ranks=1)
    assert list(alone.command[1:3]) == ["-m", "palimpsest.services.learner"]
    assert alone.environment == {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


def test_several_ranks_start_by_torchrun_with_its_logs_in_the_run_folder(tmp_path: Path):
    launched = learner(tmp_path, ranks=2)
    assert "--nproc-per-node=2" in launched.command
    assert f"--log-dir={tmp_path}/t/cache/torchrun" in launched.command
    assert launched.scratch == tmp_path / "t" / "cache" / "torchrun"


@pytest.mark.servers
def test_the_scratch_folder_of_a_process_is_deleted_with_it(tmp_path: Path):
    scratch = tmp_path / "scratch"
    child = Child("it", python("-c", f"import os; os.makedirs({str(scratch / 'a')!r})"), tmp_path / "log")
    child.scratch = scratch
    child.start()
    assert child.process is not None
    child.process.wait()
    assert scratch.exists()
    child.kill_group()
    assert not scratch.exists()


def test_free_ports_are_distinct():
    ports = [free_port("127.0.0.1") for _ in range(500)]
    assert len(set(ports)) == 500


def test_a_service_can_listen_on_a_reserved_port_twice_in_a_row():
    port = free_port("127.0.0.1")
    for _ in range(2):
        with listen("127.0.0.1", port, key="learner") as service:
            with socket.create_connection(("127.0.0.1", port)):
                pass
            assert service.getsockname()[1] == port
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_another_program_cannot_bind_a_reserved_port():
    port = free_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
