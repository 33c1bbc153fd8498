"""A learner of two nodes, each with its own torchrun as in the chart, survives the death of a rank."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from palimpsest.common.files import write
from palimpsest.common.user_error import ExitCode
from tests.runs.endless import ENDLESS
from tests.runs.run_process import check_ledger, check_whole_groups, history, newest_manifest, scripted
from tests.runs.unsupervised import WITHIN_S, Services

pytestmark = [pytest.mark.servers, pytest.mark.long]
NODES = ("node-0", "node-1")


@pytest.fixture
def services(tmp_path: Path, starting_model: Path) -> Iterator[Services]:
    toml = scripted(tmp_path, starting_model, versions=5)
    made = Services(toml, tmp_path / "scripted", "--learner.sharding=full")
    write(made.home / "run.toml", toml.read_bytes())  # as `palimpsest run` would: the audit reads it
    yield made
    made.end()


def test_a_learner_of_two_nodes_continues_from_its_checkpoint_when_a_rank_is_killed(services: Services) -> None:
    services.start("snapshot_store", "snapshot_store")
    services.start("env_gateway", "env_gateway")
    services.start("rollout", "rollout", f"--rollout.port={services.ports['rollout']}")
    services.until(lambda: services.status("snapshot_store").get("waiting_for", "") is None, "the store")

    services.nodes(NODES, dict.fromkeys(NODES, (ENDLESS,)))
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    (rank,) = psutil.Process(services.process("node-1").pid).children()
    rank.kill()
    assert services.forget("node-1") == 128 + 9
    assert services.forget("node-0") != 0  # its rank cannot continue alone
    versions_in_all = len(history(services.home)) + 3

    services.nodes(NODES, dict.fromkeys(NODES, (f"--learner.versions={versions_in_all}",)))
    for name in NODES:
        assert services.process(name).wait(timeout=WITHIN_S) == 0, services.log(name).read_text()[-3000:]
    manifest = newest_manifest(services.home)
    assert {name.split("_")[2] for name in manifest["shards"] if name.startswith("__")} == {"0", "1"}
    assert manifest["writer"] == 2
    versions = [line["version"] for line in history(services.home)]
    assert len(versions) == len(set(versions)) == versions_in_all
    check_whole_groups(check_ledger(services.home), groups=versions_in_all * 4, samples=4)


SHARING = ("--learner.context_parallel=2", "--learner.layout=packed", "--model.attention=sdpa")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [(("--learner.optimizer.lr=0.5",), "learner.optimizer.lr is 0.5, not"), (SHARING, "context_parallel is 2, not 1")],
)
def test_nodes_that_disagree_end_with_the_difference(
    flags: tuple[str, ...], difference: str, services: Services
) -> None:
    services.nodes(NODES, {"node-1": flags})
    for name in NODES:
        assert services.process(name).wait(timeout=WITHIN_S) == ExitCode.CONFIGURATION
        log = services.log(name).read_text()
        assert "rank 1 of the learner" in log
        assert difference in log
