"""Runs by interruption with real processes, one of which dies in the middle of a cut.

The engine is scripted and slow, so that trajectories are alive at every cut; the learner's scores are checked token by
token against plain transformers under the stored weights of the version that sampled it.
"""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import OLD_LOGPROBS, TRAJECTORIES, OldLogprobsComputed, SegmentFlushed, decode
from palimpsest.rescore import Models, rescore
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, scripted

pytestmark = pytest.mark.servers
VERSIONS = 8
LAYOUTS = 5e-3
"""Largest difference that another padding makes to a log-prob of the small bf16 model, in nats."""


def interrupted(
    folder: Path, model: Path, *flags: str, environment: dict[str, str] | None = None
) -> tuple[RunProcess, Path]:
    toml = scripted(folder, model, versions=VERSIONS, tokens_per_s=25.0)
    run = RunProcess(
        toml,
        "--learner.proximal.kind=interruption",
        "--local.rollout_workers=2",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        *flags,
        environment=environment,
    )
    return run, folder / "scripted"


def records(home: Path, topic: str) -> list[Any]:
    bus = SqliteBus(home / "bus.sqlite")
    with bus.consumer(topic) as consumer:
        found = []
        while batch := consumer.poll(limit=1000, timeout_s=0):
            found += [decode(topic, record.body) for record in batch]
    bus.close()
    return found


def check_scores(home: Path, model: Path) -> dict[str, Any]:
    """Every recorded old log-prob is that of plain transformers; no token was scored twice with different weights."""
    seen = rescore(home / "records", Models(home / "snapshots", str(model), "eager"))
    assert seen["alone_max_abs"] <= LAYOUTS
    said: dict[tuple[Any, ...], set[str]] = {}
    for score in records(home, OLD_LOGPROBS):
        assert isinstance(score, OldLogprobsComputed)
        for token in range(score.start, score.stop):
            said.setdefault((score.trajectory, token, score.version), set()).add(score.digest)
    assert all(len(digests) == 1 for digests in said.values())
    return seen


def missing(home: Path) -> float:
    return sum(line["all"]["missing"] for line in history(home))


def test_cuts_flush_what_is_alive_and_every_token_is_exact(tmp_path: Path, starting_model: Path) -> None:
    patient = "--learner.proximal.deadline_s=600"  # nobody dies here: all the time a busy machine needs
    run, home = interrupted(tmp_path, starting_model, "--local.learner_ranks=2", patient)
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    check_whole_groups(check_ledger(home), groups=VERSIONS * 4, samples=4)
    lines = history(home)
    assert all(line["exact"] for line in lines)
    assert sum(line["multi_version"] for line in lines) > 0
    assert missing(home) == 0
    flushed = [m for m in records(home, TRAJECTORIES) if isinstance(m, SegmentFlushed)]
    assert flushed
    assert len({flush.cut for flush in flushed}) > 1
    assert check_scores(home, starting_model)["tokens"] > 500


def test_a_worker_that_dies_in_the_middle_of_a_cut_costs_time_only(tmp_path: Path, starting_model: Path) -> None:
    """Of all places in a cut, one with real processes; test_learner_schedules.py tries every one, and workers that are
    not heard of for a while, and learners that are stopped."""
    environment = {"PALIMPSEST_FAULT": "rollout.at_cut:2", "PALIMPSEST_FAULT_ONCE": str(tmp_path / "died")}
    run, home = interrupted(tmp_path, starting_model, environment=environment)
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    assert (tmp_path / "died").exists()
    ledger = check_ledger(home)
    # overtaken while the worker started anew, and what that left of their groups
    assert set(ledger["dropped"]) <= {"over_staleness", "group_too_small"}
    assert ledger["trained"] + sum(ledger["dropped"].values()) >= VERSIONS * 16
    assert all(line["exact"] for line in history(home))
    check_scores(home, starting_model)
