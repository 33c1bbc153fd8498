"""Replicas and interruption over a real Kafka: old log-probs on the log equal those of plain transformers.

The engine is scripted and slow, so trajectories are in progress while versions change.
"""

from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.messages import OLD_LOGPROBS, TRAJECTORIES, OldLogprobsComputed, SegmentFlushed, decode
from palimpsest.rescore import Models, rescore
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, newest_manifest, scripted
from tools.backends.kafka import Kafka

pytestmark = pytest.mark.servers
VERSIONS = 8
LAYOUTS = 5e-3
"""Nats. Largest effect of padding on a log-prob of the small bf16 model."""


def finished(
    kind: str, kafka: Kafka, folder: Path, model: Path, *flags: str, environment: dict[str, str] | None = None
) -> Path:
    """Folder of a finished run with two rollout workers, every version kept and every batch recorded."""
    run = RunProcess(
        scripted(folder, model, versions=VERSIONS, tokens_per_s=4.0),
        "--bus.kind=kafka",
        f"--bus.servers={kafka.servers}",
        f"--run.id={kind}",
        f"--learner.proximal.kind={kind}",
        "--local.rollout_workers=2",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        *flags,
        environment=environment,
    )
    code, output = run.finish()
    assert code == 0, output[-3000:]
    assert not (folder / kind / "bus.sqlite").exists()
    return folder / kind


def records(kind: str, kafka: Kafka, topic: str) -> list[Any]:
    with closing(KafkaBus(Connection(kafka.servers, {}), prefix=f"palimpsest.{kind}.")) as bus:
        return [decode(topic, record.body) for record in read_existing(bus, topic)]


def check(home: Path, model: Path, scores: list[Any]) -> None:
    """Every trajectory is accounted for, and every trained token has one old log-prob, from its own weights."""
    check_whole_groups(check_ledger(home), groups=VERSIONS * 4, samples=4)
    lines = history(home)
    assert len(lines) == VERSIONS
    assert any(newest_manifest(home)["score_offsets"].values()), "without offsets a restart would read all scores again"
    for line in lines:
        assert (line["exact"], line["all"]["missing"]) == (True, 0)
    assert sum(line["multi_version"] for line in lines) > 0
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


def test_replicas_score_every_trained_token(tmp_path: Path, kafka_server: Kafka, starting_model: Path) -> None:
    home = finished("replica", kafka_server, tmp_path, starting_model, "--local.replicas=2")
    scores = records("replica", kafka_server, OLD_LOGPROBS)
    check(home, starting_model, scores)
    assert {score.by for score in scores} <= {"replica-0", "replica-1"}


def test_scores_survive_a_learner_that_dies_after_a_cut(
    tmp_path: Path, kafka_server: Kafka, starting_model: Path
) -> None:
    """The restarted learner finds its earlier scores on the log."""
    marker = tmp_path / "died"
    environment = {"PALIMPSEST_FAULT": "learner.after_cut:3", "PALIMPSEST_FAULT_ONCE": str(marker)}
    patient = "--learner.proximal.deadline_s=600"
    home = finished("interruption", kafka_server, tmp_path, starting_model, patient, environment=environment)
    assert marker.exists()
    scores = records("interruption", kafka_server, OLD_LOGPROBS)
    check(home, starting_model, scores)
    assert {score.by for score in scores} == {"learner"}
    cuts = {m.cut for m in records("interruption", kafka_server, TRAJECTORIES) if isinstance(m, SegmentFlushed)}
    assert len(cuts) > 1, "cuts must flush trajectories more than once"
