"""Values of the summary against values computed by hand."""

from pathlib import Path

import pytest

from palimpsest.common.messages import VersionApplied, WorkerAlive
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState
from palimpsest.services.report.folder import CheckpointSummary, Contents, LogSummary, Seconds, read_run_config
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.summary import last_heartbeats, learner_wait_share, mean_by_staleness, summarize, tenth
from tests.records.history_lines import a_line


def alive(seconds: float, *, idle_s: float = 0.0, tokens: int = 0, worker: str = "worker-0") -> WorkerAlive:
    return WorkerAlive(run="t", worker=worker, version=1, live=0, sampled_tokens=tokens, seconds=seconds, idle_s=idle_s)


def applied(version: int, *, pause_s: float, error: float = 0.01, accepted: bool = True) -> VersionApplied:
    return VersionApplied(
        run="t", worker="worker-0", version=Version(version), digest="", accepted=accepted, canary_error=error,
        pause_s=pause_s, live=1,
    )  # fmt: skip


@pytest.fixture
def empty(tmp_path: Path) -> Contents:
    """Contents of a run that did not start."""
    (tmp_path / "run.toml").write_text(
        'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
    )
    return Contents(tmp_path, read_run_config(tmp_path))


def having(empty: Contents, *lines: Line, **more: object) -> Contents:
    return Contents(empty.folder, empty.config, tuple(lines), **more)  # type: ignore[arg-type]


def test_a_tenth_is_a_share_of_trajectories_not_of_batches(empty: Contents):
    lines = [a_line(0, successes="0100000000"), a_line(1, successes="0000000000"), a_line(2, successes="1111111011")]
    summary = summarize(having(empty, *lines))
    assert summary["success_first"] == pytest.approx(1 / 3)  # of "010"
    assert summary["success_last"] == pytest.approx(2 / 3)  # of "011"


def test_a_tenth_has_at_least_one_trajectory():
    assert tenth("01") == ("0", "1")


def test_the_reward_of_a_tenth_uses_the_means_of_its_batches(empty: Contents):
    lines = [a_line(0, successes="0" * 10, reward=0.1), a_line(1, successes="0" * 10, reward=0.4)]
    lines += [a_line(2, successes="0" * 100, reward=0.9)]  # a tenth of 120 is 12
    summary = summarize(having(empty, *lines))
    assert summary["reward_first"] == pytest.approx((10 * 0.1 + 2 * 0.4) / 12)
    assert summary["reward_last"] == pytest.approx(0.9)


def test_means_by_staleness_are_weighted_by_finite_tokens():
    lines = [
        a_line(0, tokens={0: {"tokens": 10.0, "log_discrepancy_abs": 0.1}}),
        a_line(1, tokens={0: {"tokens": 32.0, "log_discrepancy_abs": 0.4, "nonfinite": 2.0}, 3: {"tokens": 5.0}}),
    ]
    means = mean_by_staleness(lines, "log_discrepancy_abs")
    assert means == {"0": pytest.approx((10 * 0.1 + 30 * 0.4) / 40), "3": pytest.approx(0.001)}
    assert list(means) == ["0", "3"]


def test_a_staleness_without_finite_tokens_has_no_mean():
    assert mean_by_staleness([a_line(0, tokens={2: {"tokens": 4.0, "nonfinite": 4.0}})], "log_discrepancy_abs") == {}


def test_the_ledger_balances_with_the_checkpoint(empty: Contents):
    state = LedgerState(
        next_index=9, open_groups={}, trained=20, dropped={"deadline": 3, "over_staleness": 1}, dead_lettered=2,
        offered=40,
    )  # fmt: skip
    summary = summarize(having(empty, a_line(0), checkpoint=CheckpointSummary(state, 0, 5.0)))
    assert summary["trajectories"] == {
        "offered": 40,
        "trained": 20,
        "dropped": {"deadline": 3, "over_staleness": 1},
        "dead_lettered": 2,
        "pending": 14,
    }
    assert summary["dropped_share"] == pytest.approx(4 / 26)


def test_the_learner_waits_for_a_share_of_its_time_after_the_first_batch_of_each_start():
    lines = [
        a_line(0, phases={"wait": 30.0, "train": 1.0}),  # the engine starts
        a_line(1, phases={"publish": 0.5, "checkpoint": 0.5, "wait": 1.0, "train": 2.0}),
        a_line(2, phases={"wait": 40.0, "train": 9.0}),  # resumed
        a_line(3, phases={"publish": 0.5, "checkpoint": 0.5, "wait": 3.0, "train": 2.0}),
    ]
    assert learner_wait_share(lines) == pytest.approx(4.0 / 10.0)
    assert learner_wait_share(lines[:1]) is None


def test_a_worker_started_again_begins_its_counts_anew(empty: Contents):
    log = LogSummary(
        alive=(
            alive(10, idle_s=4, tokens=100),
            alive(20, idle_s=5, tokens=300),
            alive(2, idle_s=2, tokens=0),
            alive(10, idle_s=3, tokens=60),
        )
    )
    assert [a.seconds for a in last_heartbeats(log.alive)] == [20, 10]
    summary = summarize(having(empty, log=log))
    assert summary["rollout_wait_share"] == pytest.approx(8 / 30)
    assert summary["tokens_per_second"]["rollout"] == pytest.approx(360 / 30)


def test_rates_of_several_workers_add_up(empty: Contents):
    log = LogSummary(alive=(alive(10, tokens=100), alive(20, tokens=100, worker="worker-1"), alive(20, tokens=240)))
    assert summarize(having(empty, log=log))["tokens_per_second"]["rollout"] == pytest.approx(240 / 20 + 100 / 20)


def test_updates_of_the_workers(empty: Contents):
    log = LogSummary(
        applied=(
            applied(0, pause_s=0.1),
            applied(1, pause_s=0.3, error=0.02),
            applied(2, pause_s=0.2, error=0.5, accepted=False),
        )
    )
    summary = summarize(having(empty, log=log))
    assert summary["update_pause_ms_p50"] == pytest.approx(200.0)
    assert summary["canary_error_max"] == 0.5
    assert summary["refused_versions"] == 1


def test_tokens_and_bytes(empty: Contents):
    log = LogSummary(records=4, duplicates=1, tokens=200, trainable_tokens=50, bytes=1700)
    lines = [a_line(0, tokens={0: {"tokens": 30.0}}), a_line(1, tokens={0: {"tokens": 20.0}, 1: {"tokens": 50.0}})]
    summary = summarize(having(empty, *lines, log=log, seconds=Seconds(setup=31.0, run=4.0)))
    assert summary["tokens_trained"] == 100
    assert summary["tokens_per_second"]["learner"] == pytest.approx(25.0)
    assert summary["seconds"] == {"setup": 31.0, "run": 4.0}
    assert summary["log_bytes_per_token"] == pytest.approx(8.5)
    assert summary["duplicates"] == 1
    assert summary["tokens_by_staleness"] == {"0": 50, "1": 50}
    assert summary["max_staleness_seen"] == 1
    assert summary["multi_version_trajectories"] == 2


def test_one_batch_with_a_surrogate_makes_the_run_inexact(empty: Contents):
    assert summarize(having(empty, a_line(0), a_line(1)))["exact"] is True
    assert summarize(having(empty, a_line(0), a_line(1, exact=False)))["exact"] is False


def test_a_run_without_trained_versions_has_none_instead_of_zeros(empty: Contents):
    summary = summarize(having(empty, log=LogSummary(offered=40)))
    assert summary["trajectories"] == {
        "offered": 40,
        "trained": 0,
        "dropped": {},
        "dead_lettered": 0,
        "pending": 40,
    }
    assert (summary["versions"], summary["finished"]) == (0, False)
    for name in (
        "success_first", "success_last", "reward_first", "exact", "max_staleness_seen", "learner_wait_share",
        "rollout_wait_share", "update_pause_ms_p50", "canary_error_max", "duplicates", "dead_letters", "dropped_share",
    ):  # fmt: skip
        assert summary[name] is None, name
    assert summary["tokens_per_second"] == {"rollout": None, "learner": None}
    assert summary["seconds"] == {"setup": None, "run": None}
