"""A run of two ranks with engines that sleep: real processes, of which a rank dies. The engine is scripted, and the log
shows the turns (test_sleeping_engines.py shows that memory is returned)."""

from pathlib import Path

import pytest

from palimpsest.common.messages import CONTROL, WORKERS, CutReached, CutRequested, VersionPublished
from tests.integration.test_interrupted_runs import interrupted, records
from tests.runs.endless import ENDLESS, end_after_two_versions, kill_a_learner, several_versions
from tests.runs.run_process import check_ledger, check_whole_groups, history, newest_manifest, wait_for

pytestmark = [pytest.mark.servers, pytest.mark.long]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_take_their_turns_and_continue_after_the_death_of_a_rank(
    tmp_path: Path, starting_model: Path, sharding: str
) -> None:
    run, home = interrupted(
        tmp_path,
        starting_model,
        ENDLESS,
        "--local.learner_ranks=2",
        f"--learner.sharding={sharding}",
        "--rollout.engine.sleep=true",
    )
    try:
        wait_for(lambda: len(history(home)) >= 2 and several_versions(home), run, name="a continued trajectory")
        kill_a_learner(run, ranks=2)
        versions = end_after_two_versions(run, home)
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    ledger = check_ledger(home)
    check_whole_groups(ledger, groups=versions * 4, samples=4)
    assert newest_manifest(home)["optimizer_steps"] == versions
    assert all(line["exact"] and line["skipped"] == 0 for line in history(home))
    check_turns(home)


def check_turns(home: Path) -> None:
    """Each version was trained in a cut, and each worker slept in one."""
    answers = [message for message in records(home, WORKERS) if isinstance(message, CutReached)]
    assert {answer.worker for answer in answers} == {"worker-0", "worker-1"}
    asked: set[int] = set()
    for message in records(home, CONTROL):
        if isinstance(message, CutRequested):
            asked.add(message.version)
        elif isinstance(message, VersionPublished) and message.version:
            assert message.version - 1 in asked, f"version {message.version} was trained without a cut"
