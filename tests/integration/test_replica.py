"""Replica processes over one log and one store: killed at failpoints, several at once, stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from palimpsest.common.arrays import pack_int32
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.config import load as load_config
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    OldLogprobsComputed,
    RunFinished,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
)
from palimpsest.common.run_folder import objects_folder
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader, WaitLimits
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore, spans
from tests.learner_parts.models import canaries, load, logprobs, perturb
from tests.processes.waiting import LIMIT_S
from tests.records.any_learner import any_control
from tests.records.builders import a_finished, a_row, a_segment
from tests.runs.run_process import ROOT
from tests.servers.stores import StoreProcess
from tools.backends.ports import free

pytestmark = pytest.mark.servers

RUN = """
run.id = "t"
run.folder = "{folder}"
model.path = "{model}"
model.attention = "eager"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
learner.proximal.kind = "{kind}"
replica.batch_tokens = 96
sampling.max_trajectory_tokens = 1000
"""
VERSIONS = 3
LAYOUT_NOISE = 2e-3
"""Nats. Largest effect of padding and of other rows in a pass, in bf16."""


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until holds() is true."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class ReplicaProcess:
    """`python -m palimpsest.services.learner.replica`, on the same port after restarts."""

    def __init__(self, run: Path, store: str, name: str) -> None:
        self.run, self.store, self.name, self.port = run, store, name, free()
        self.log = run.parent / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, fault: str = "") -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PALIMPSEST_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "palimpsest.services.learner.replica", str(self.run),
                    f"--replica.name={self.name}",
                    f"--replica.port={self.port}", f"--snapshot_store.url={self.store}",
                ],
                env={**kept, "PYTHONPATH": str(ROOT), "PALIMPSEST_FAULT": fault},
                stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip

    def ready(self) -> None:
        """Wait until the replica is ready."""
        eventually(lambda: self._asked("readyz").get("ready") is True)

    def status(self) -> dict[str, Any]:
        return self._asked("v1/status")

    def _asked(self, path: str) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/{path}", timeout=LIMIT_S).json()
        except httpx.TransportError:
            return {}
        return answer

    def ended(self) -> int:
        """Wait for the end of the process. Returns its exit code."""
        assert self.process is not None
        return self.process.wait(LIMIT_S)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Setup:
    """A store with announced versions, a log, and replicas."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run = folder / "run.toml"
        self.run.write_text(RUN.format(folder=folder / "runs", model=model, kind="replica"))
        self.store = StoreProcess(self.run)
        self.store.start()
        self.store.ready()
        self.bus: Bus = open_bus(load_config([str(self.run)], {}, program="").config)
        self.plain: dict[int, torch.nn.Module] = {}
        self.replicas: list[ReplicaProcess] = []
        moved = load(model)
        with SnapshotClient(self.store.url) as client:
            writer = Writer(client)
            writer.begin()
            for version in range(VERSIONS):
                perturb(moved, by=0.05, seed=version)
                weights = raw_tensors(named_weights(moved))
                manifest = client.put("t", Version(version), weights, canaries(moved), writer=writer.epoch)
                published = VersionPublished(
                    run="t", version=Version(version), digest=manifest.digest, published_at=0.0, writer=1
                )
                self.bus.publish(CONTROL, [Outgoing("t", encode(published))])
                self.plain[version] = load(model)
                self.plain[version].load_state_dict(moved.state_dict())

    def replica(self, name: str, fault: str = "") -> ReplicaProcess:
        made = ReplicaProcess(self.run, self.store.url, name)
        made.start(fault)
        self.replicas.append(made)
        return made

    def publish(self, messages: list[TrajectoryFinished]) -> None:
        self.bus.publish(TRAJECTORIES, [Outgoing(message.group, encode(message)) for message in messages])

    def scores_on_log(self) -> list[OldLogprobsComputed]:
        with self.bus.consumer(OLD_LOGPROBS) as consumer:
            records = consumer.poll(limit=100_000, timeout_s=0.0)
        return [decode(OLD_LOGPROBS, record.body) for record in records]

    def attached(self, messages: list[TrajectoryFinished]) -> tuple[list[Row], ScoreStore]:
        """Rows with the old log-probs that the learner reads from the topic, and its score store."""
        scores = ScoreStore()
        dead_letters = DeadLetterWriter(self.bus, run="t", confirm=lambda: None)
        reader = ScoreReader(
            self.bus,
            scores,
            dead_letters,
            WaitLimits(1.0),
            run="t",
            wanted=lambda _: True,
            confirm=lambda: None,
            control=any_control(),
        )
        reader.read()
        rows = reader.attach([to_row(message) for message in messages])
        reader.close()
        return rows, scores

    def check(self, messages: list[TrajectoryFinished]) -> ScoreStore:
        """Assert that every trainable token has the old log-prob of its own version."""
        rows, scores = self.attached(messages)
        for row in rows:
            assert scores.missing(row) == []
            assert row.old is not None
            for start, stop, version in spans(row.versions):
                plain = [0.0, *logprobs(self.plain[version], row.tokens.tolist(), row.temperature)]
                assert np.abs(row.old[start:stop] - plain[start:stop]).max() <= LAYOUT_NOISE
        return scores

    def close(self) -> None:
        for replica in self.replicas:
            replica.kill()
        self.bus.close()
        self.store.kill()


def some_trajectories(groups: range) -> list[TrajectoryFinished]:
    """Trajectories with different tokens, each with segments of several versions."""
    made = []
    for index in groups:
        generator = torch.Generator().manual_seed(index)
        message = a_finished(
            index, 0, run="t", tokens=24,
            segments=(a_segment(2, 7, index % VERSIONS), a_segment(9, 15, 1), a_segment(15, 24, 2)),
        )  # fmt: skip
        tokens = pack_int32(torch.randint(3, 250, (24,), generator=generator).tolist())
        fields = {name: getattr(message, name) for name in message.__struct_fields__}
        made.append(TrajectoryFinished(**fields | {"tokens": tokens}))
    return made


def to_row(message: TrajectoryFinished) -> Row:
    tokens = np.frombuffer(message.tokens, dtype=np.int32)
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for segment in message.segments:
        versions[segment.start : segment.stop] = segment.version
    return a_row(message.trajectory, tokens.tolist(), versions.tolist(), temperature=message.temperature)


@pytest.fixture
def setup(tmp_path: Path, starting_model: Path) -> Iterator[Setup]:
    made = Setup(tmp_path, starting_model)
    yield made
    made.close()


def complete(setup: Setup, messages: list[TrajectoryFinished]) -> bool:
    rows, scores = setup.attached(messages)
    return not any(scores.missing(row) for row in rows)


@pytest.mark.parametrize("place", ["replica.before_publishing", "replica.after_publishing"])
def test_a_replica_killed_and_restarted_leaves_no_token_unscored(setup: Setup, place: str) -> None:
    messages = some_trajectories(range(24))
    setup.publish(messages)
    killed = setup.replica("replica-0", fault=f"{place}:3")
    assert killed.ended() == -signal.SIGKILL
    before = len(setup.scores_on_log())
    assert not complete(setup, messages)
    killed.start()
    killed.ready()
    eventually(lambda: complete(setup, messages))
    scores = setup.check(messages)
    assert before > 0
    assert scores.repeats + scores.conflicts > 0, "the restarted replica publishes some scores again"
    assert scores.largest_conflict <= LAYOUT_NOISE


def test_two_replicas_share_the_work_and_one_takes_over_when_the_other_is_killed(setup: Setup) -> None:
    shared = objects_folder(setup.run.parent / "runs" / "t")
    shared.mkdir(parents=True)  # as a worker of this machine would
    one, other = setup.replica("replica-0"), setup.replica("replica-1")
    one.ready()
    other.ready()
    eventually(lambda: len(one.status().get("partitions", ())) == len(other.status().get("partitions", ())) == 2)
    first, second = some_trajectories(range(16)), some_trajectories(range(16, 48))
    setup.publish(first)
    eventually(lambda: complete(setup, first))
    assert {score.by for score in setup.scores_on_log()} == {"replica-0", "replica-1"}
    scores = setup.check(first)
    assert (scores.repeats, scores.conflicts) == (0, 0), "exactly one replica scores each segment"
    other.kill()
    setup.publish(second)
    eventually(lambda: complete(setup, second))
    setup.check(second)
    with SnapshotClient(setup.store.url) as client:
        objects = {client.manifest(Version(version)).object for version in range(VERSIONS)}
    assert {path.name for path in shared.iterdir()} == {*objects, "lock"}


def test_a_stopped_replica_finishes_the_records_it_has_read(setup: Setup) -> None:
    messages = some_trajectories(range(24))
    replica = setup.replica("replica-0")
    replica.ready()
    setup.publish(messages)
    eventually(lambda: len(setup.scores_on_log()) > 0)
    assert replica.process is not None
    replica.process.terminate()
    assert replica.ended() == 130, replica.log.read_text()
    setup.check(messages)
    published = len(setup.scores_on_log())
    replica.start()
    replica.ready()
    eventually(lambda: len(replica.status().get("partitions", ())) == 4)
    setup.bus.publish(CONTROL, [Outgoing("t", encode(RunFinished(run="t", version=Version(2), writer=1)))])
    assert replica.ended() == 0, replica.log.read_text()
    assert len(setup.scores_on_log()) == published


def test_a_replica_serves_its_status_and_survives_a_restart_of_the_store(setup: Setup) -> None:
    messages = some_trajectories(range(4))
    replica = setup.replica("replica-0")
    replica.ready()
    setup.store.again()
    setup.publish(messages)
    eventually(lambda: complete(setup, messages))
    setup.check(messages)
    url = f"http://127.0.0.1:{replica.port}"
    assert httpx.get(f"{url}/healthz", timeout=LIMIT_S).json() == {"service": "replica"}
    metrics = httpx.get(f"{url}/metrics", timeout=LIMIT_S).text
    assert "palimpsest_replica_scored_tokens_total 80.0" in metrics
    assert "palimpsest_replica_skipped_total{" not in metrics
    status = replica.status()
    assert (status["service"], status["replica"], status["run"], status["waiting"]) == ("replica", "replica-0", "t", 0)
    assert status["scored_tokens"] == 80


@pytest.mark.parametrize("kind", ["snapshot", "interruption"])
def test_a_replica_does_not_start_if_no_process_reads_its_scores(setup: Setup, starting_model: Path, kind: str) -> None:
    setup.run.write_text(RUN.format(folder=setup.run.parent / "runs", model=starting_model, kind=kind))
    replica = setup.replica("replica-0")
    assert replica.ended() == int(ExitCode.CONFIGURATION)
    assert f'learner.proximal.kind is "{kind}", so no process reads the scores of a replica' in replica.log.read_text()
