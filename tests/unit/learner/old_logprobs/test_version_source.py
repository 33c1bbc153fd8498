"""Who shares downloads: several ranks of a node always, a single rank never, a replica where other processes do."""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.run_folder import objects_folder
from palimpsest.common.snapshots.shared_objects import SharedObjects
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.version_source import source_of_rank, source_of_replica
from tests.unit.common.test_walker import a_chain


class SomeRanks(ProcessGroup):
    """Only the number of the ranks."""

    def __init__(self, size: int) -> None:
        self.size = size


def a_config(tmp_path: Path) -> RunConfig:
    run = tmp_path / "run.toml"
    run.write_text(
        f'run.id = "t"\nrun.folder = "{tmp_path}"\nmodel.path = "m"\ntasks.environments = {{ lookup = 1.0 }}\n'
        f"learner.versions = 3\n"
    )
    return load([str(run)], {}, program="").config


def read(source: Any, manifest: Any) -> None:
    with source.object(manifest) as chunks:
        assert b"".join(chunks)


@pytest.mark.parametrize(
    ("ranks", "of_node", "node", "folder"),
    [
        (1, None, None, None),
        (1, 8, 0, None),  # the launcher of another program set the variables
        (2, 1, 1, None),
        (2, 2, 0, "objects"),
        (16, 8, 1, "objects-1"),
    ],
)
def test_several_ranks_of_a_node_share_the_files_of_its_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    of_node: int | None,
    node: int | None,
    folder: str | None,
) -> None:
    for name, value in (("LOCAL_WORLD_SIZE", of_node), ("GROUP_RANK", node)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    store: Any = a_chain()
    source = source_of_rank(a_config(tmp_path), store, SomeRanks(ranks))
    read(source, store.manifests[Version(0)])
    if folder is None:
        assert source is store
    assert [path.name for path in (tmp_path / "t" / "cache").glob("*")] == ([folder] if folder else [])


def test_a_replica_shares_the_files_that_workers_of_its_machine_have_begun(tmp_path: Path) -> None:
    store: Any = a_chain()
    first, second = store.manifests[Version(0)], store.manifests[Version(1)]
    replica = source_of_replica(a_config(tmp_path), store)
    read(replica, first)
    assert not (tmp_path / "t").exists()
    worker = SharedObjects(store, objects_folder(tmp_path / "t"))
    read(worker, first)
    for source in (replica, worker):
        read(source, second)
    assert store.served == 3
