"""Replicas and interruption over a real Kafka: old log-probs on the log equal those of plain transformers.

The engine is scripted and slow, and a tool waits for versions, so trajectories span several versions. Each run ends
after it has trained on such a trajectory. While the run with replicas trains, Schemathesis sends requests to all its
services.
"""

from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.control.access import OPERATOR_TOKEN, Role
from palimpsest.common.messages import OLD_LOGPROBS, TRAJECTORIES, OldLogprobsComputed, SegmentFlushed, decode
from palimpsest.rescore import Models, rescore
from tests.runs import fuzzed_requests, held_lookup
from tests.runs.endless import ENDLESS, end_after_two_versions, several_versions
from tests.runs.run_process import (
    RunProcess,
    check_ledger,
    check_whole_groups,
    history,
    newest_manifest,
    scripted,
    wait_for,
)
from tools.backends.kafka import Kafka

pytestmark = pytest.mark.servers
LAYOUTS = 5e-3
"""Nats. Largest effect of padding on a log-prob of the small bf16 model."""


def started(
    kind: str,
    kafka: Kafka,
    folder: Path,
    model: Path,
    *flags: str,
    tokens_per_s: float = 4.0,
    environment: dict[str, str] | None = None,
) -> tuple[RunProcess, Path]:
    """A run with two rollout workers, every version kept and every batch recorded, and its folder."""
    run = RunProcess(
        scripted(folder, model, versions=1, tokens_per_s=tokens_per_s),
        ENDLESS,
        "--bus.kind=kafka",
        f"--bus.servers={kafka.servers}",
        f"--run.id={kind}",
        f"--learner.proximal.kind={kind}",
        "--local.rollout_workers=2",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        *held_lookup.FLAGS,
        *flags,
        environment={**(environment or {}), held_lookup.VARIABLE: str(folder / kind)},
    )
    return run, folder / kind


def finish(run: RunProcess, home: Path) -> None:
    code, output = run.finish()
    assert code == 0, output[-3000:]
    assert not (home / "bus.sqlite").exists()


def records(kind: str, kafka: Kafka, topic: str) -> list[Any]:
    with closing(KafkaBus(Connection(kafka.servers, {}), prefix=f"palimpsest.{kind}.")) as bus:
        return [decode(topic, record.body) for record in read_existing(bus, topic)]


def reads_from_an_offset(home: Path) -> bool:
    """Whether a restart from the newest checkpoint leaves out scores of groups that are closed."""
    return any(newest_manifest(home)["score_offsets"].values())


def check(home: Path, model: Path, scores: list[Any], *, versions: int) -> None:
    """Every trajectory is accounted for, and every trained token has one old log-prob, from its own weights."""
    check_whole_groups(check_ledger(home), groups=versions * 4, samples=4)
    lines = history(home)
    assert len(lines) == versions
    assert reads_from_an_offset(home), "without offsets a restart would read all scores again"
    for line in lines:
        assert (line["exact"], line["all"]["missing"]) == (True, 0)
    assert several_versions(home)
    seen = rescore(home / "records", Models(home / "snapshots", str(model), "eager"))
    assert seen["tokens"] == sum(line["tokens"] for line in lines)
    assert seen["alone_max_abs"] <= LAYOUTS
    weights: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for score in scores:
        assert isinstance(score, OldLogprobsComputed)
        for token in range(score.start, score.stop):
            weights[score.trajectory, token, score.version].add(score.digest)
    assert weights
    assert all(len(digests) == 1 for digests in weights.values())


def test_replicas_score_every_trained_token(
    tmp_path: Path, kafka_server: Kafka, starting_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemathesis sends requests to all services while the run trains. The run has no end until they are sent."""
    flags = ("--local.replicas=2", "--rollout.environments=gateway")
    environment = fuzzed_requests.tokens(tmp_path)
    monkeypatch.setenv(OPERATOR_TOKEN, Role.TUNE)
    run, home = started(
        "replica", kafka_server, tmp_path, starting_model, *flags, tokens_per_s=1.0, environment=environment
    )
    try:
        wait_for(lambda: len(history(home)) >= 1, run, name="the first version")
        fuzzed_requests.fuzz(run, home, tmp_path)
        wait_for(lambda: several_versions(home), run, name="a trajectory of several versions")
        # A held trajectory keeps its group open, and a restart reads from the scores of the oldest open group.
        wait_for(lambda: reads_from_an_offset(home), run, name="an offset of the scores")
        versions = end_after_two_versions(run, home)
        finish(run, home)
    finally:
        run.kill_everything()
    scores = records("replica", kafka_server, OLD_LOGPROBS)
    check(home, starting_model, scores, versions=versions)
    assert {score.by for score in scores} <= {"replica-0", "replica-1"}


def test_scores_survive_a_learner_that_dies_after_a_cut(
    tmp_path: Path, kafka_server: Kafka, starting_model: Path
) -> None:
    """The restarted learner finds its earlier scores on the log."""
    marker = tmp_path / "died"
    environment = {"PALIMPSEST_FAULT": "learner.after_cut:3", "PALIMPSEST_FAULT_ONCE": str(marker)}
    patient = "--learner.proximal.deadline_s=600"
    run, home = started("interruption", kafka_server, tmp_path, starting_model, patient, environment=environment)

    def cuts() -> set[int]:
        """The cuts that flushed a trajectory."""
        trajectories = records("interruption", kafka_server, TRAJECTORIES)
        return {record.cut for record in trajectories if isinstance(record, SegmentFlushed)}

    try:
        wait_for(marker.exists, run, name="the death of the learner")
        wait_for(lambda: several_versions(home), run, name="a trajectory of several versions")
        wait_for(lambda: len(cuts()) > 1, run, name="a second cut that flushes")
        # A held trajectory keeps its group open, and a restart reads from the scores of the oldest open group.
        wait_for(lambda: reads_from_an_offset(home), run, name="an offset of the scores")
        versions = end_after_two_versions(run, home)
        finish(run, home)
    finally:
        run.kill_everything()
    scores = records("interruption", kafka_server, OLD_LOGPROBS)
    check(home, starting_model, scores, versions=versions)
    assert {score.by for score in scores} == {"learner"}
