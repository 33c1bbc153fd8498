"""The benchmark of routes to old log-probs: its simulated workers, and its figures."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.mismatch.references import source
from bench.mismatch.toy import Toy
from bench.mismatch.training import Trainer as ToyTrainer
from bench.routes.figures import ON_THE_PATH, figures, targets
from bench.routes.instrumented_learner import VersionTimer, instrument_source, tensor_bytes
from bench.routes.simulated_workers import PAUSE_S, SimulatedWorkers
from bench.routes.variant_run import ROLLOUT, Pace, cpu_s
from bench.routes.variants import REFERENCE, SHAPES, VARIANTS, Load, Place, Variant, build_model, run_config
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.load import load as load_run
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutRequested,
    GroupOffered,
    SegmentFlushed,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
    group_id,
)
from palimpsest.common.trajectory import token_versions
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.validation import check_finished, check_sampled
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.training.state import TrainingState
from tests.records.builders import SAMPLING

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[3]
LOAD = Load(tokens=64)
FAST = 0.05
"""Seconds that the simulated workers need for a batch."""
TURN_S, TURNS = 0.002, 10_000
"""Seconds of one turn of the simulated workers, and a number of turns that suffices for every test."""


class Workers:
    """Simulated workers on a log, with the test as their learner."""

    def __init__(self, folder: Path) -> None:
        config = run_config(Variant("t", {"kind": "interruption"}), LOAD, Place(folder, folder, 1, 2))
        self.bus: Bus = open_bus(config)
        self.simulated = SimulatedWorkers(
            open_bus(config), run="t", load=LOAD, vocabulary=256, seed=3, clock=lambda: self.now
        )
        self.offered = 0
        self.now = 0.0
        """Seconds of the workers' clock, which only the test advances."""

    def offer(self, groups: int) -> None:
        """Offer this number of groups of two."""
        offers = [
            GroupOffered(
                run="t", group=group_id(i), index=i, version=Version(0), environment="lookup", task_seed=0, samples=2,
                sampling=SAMPLING, time_limit_s=60.0,
            )
            for i in range(self.offered, self.offered + groups)
        ]  # fmt: skip
        self.offered += groups
        self.bus.publish(TASKS, [Outgoing(offer.group, encode(offer)) for offer in offers])

    def publish(self, message: VersionPublished | CutRequested) -> None:
        """Publish the message on `control`."""
        self.bus.publish(CONTROL, [Outgoing("t", encode(message))])

    def messages(self, topic: str, kind: type) -> list[Any]:
        """Return all messages of this kind on the topic."""
        messages = [decode(topic, record.body) for record in read_existing(self.bus, topic)]
        return [message for message in messages if isinstance(message, kind)]

    def drive(self, until: Any) -> None:
        """Run the workers until the condition holds."""
        for _ in range(TURNS):
            if until():
                return
            self.now += TURN_S
            self.simulated.drive(FAST)
        raise AssertionError(f"the condition does not hold after {TURNS} turns")

    def sampled(self) -> int:
        """Return the number of sampled tokens of all trajectories, finished and live."""
        finished = self.messages(TRAJECTORIES, TrajectoryFinished)
        lives = sum(int((live.versions >= 0).sum()) for live in self.simulated._live)
        return lives + sum(len(segment) for record in finished for segment in record.segments)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    made.simulated.close()
    made.bus.close()


def published(version: int) -> VersionPublished:
    return VersionPublished("t", Version(version), f"digest of {version}", 0.0)


def test_each_offered_trajectory_is_sampled_once_and_valid(workers: Workers) -> None:
    workers.offer(6)
    workers.simulated.resume_clock()
    workers.simulated.drive(FAST)
    assert workers.sampled() == 0  # no version is published
    workers.publish(published(0))
    workers.drive(lambda: len(workers.simulated.finished_at) == 12)
    finished = workers.messages(TRAJECTORIES, TrajectoryFinished)
    assert sorted(record.trajectory for record in finished) == sorted(
        f"{group_id(g)}/{s}" for g in range(6) for s in (0, 1)
    )
    for record in finished:
        check_finished(record, Version(0), vocabulary=256)
        assert LOAD.tokens // 2 <= len(record.tokens) // 4 <= LOAD.tokens * 3 // 2
        assert len(record.segments) == 2  # a message, a tool's answer, a message


def test_time_between_two_turns_does_not_count(workers: Workers) -> None:
    workers.offer(1)
    workers.publish(published(0))
    workers.simulated.resume_clock()
    workers.simulated.drive(1e6)
    workers.now += 0.05
    workers.simulated.resume_clock()
    workers.simulated.drive(0.01)  # the trajectory takes less than 50 ms
    assert workers.simulated.finished_at == {}


def test_a_cut_pauses_all_workers_until_the_next_version(workers: Workers) -> None:
    workers.offer(8)
    workers.publish(published(0))
    workers.simulated.resume_clock()
    workers.drive(lambda: len(workers.simulated.finished_at) >= 2)
    workers.publish(CutRequested("t", 1, Version(0), 5.0))
    workers.drive(lambda: len(workers.messages(WORKERS, CutReached)) == 2)
    flushes = workers.messages(TRAJECTORIES, SegmentFlushed)
    assert len(flushes) == workers.simulated.flushed > 0
    for flush in flushes:
        check_sampled(flush, Version(0), vocabulary=256)
        assert {segment.version for segment in flush.segments} == {0}
    ends = {record.partition: record.offset + 1 for record in read_existing(workers.bus, TRAJECTORIES)}
    positions_of_workers = [answer.positions for answer in workers.messages(WORKERS, CutReached)]
    assert {p: max(positions.get(p, 0) for positions in positions_of_workers) for p in ends} == ends

    at_the_cut, until = workers.sampled(), workers.now + 4 * FAST
    workers.drive(lambda: workers.now > until)
    assert workers.sampled() == at_the_cut
    workers.publish(published(1))
    workers.drive(lambda: len(workers.simulated.finished_at) == 16)
    assert len(workers.simulated.holds) == 1
    assert workers.simulated.holds[0] >= PAUSE_S
    by_name = {record.trajectory: record for record in workers.messages(TRAJECTORIES, TrajectoryFinished)}
    for flush in flushes:  # flushed tokens do not change, and later tokens are of the next version
        whole, length = by_name[flush.trajectory], len(flush.tokens) // 4
        assert whole.tokens.startswith(flush.tokens)
        versions = token_versions(whole.segments, len(whole.tokens) // 4)
        assert np.array_equal(versions[:length], token_versions(flush.segments, length))
        assert set(versions[length:].tolist()) <= {-1, 1}
    assert any(1 in {segment.version for segment in record.segments} for record in by_name.values())


def version_measurements(**changes: Any) -> dict[str, Any]:
    """Return measurements of a version: passes 3 s, optimizer step 1 s, publication 1 s."""
    version = {
        "seconds": {"passes": 3.0, "step": 1.0, "publish": 1.0, "train": 5.0},
        "cpu": {"train": 4.0},
        "counts": {"trainable": 100, "trajectories": 2, "versions": 3},
        "cut": {"wait": 0.0, "read": 0.0, "score": 0.0, "stall": 0.0},
        "staleness": {0: 25, 1: 75},
        "replica": {}, "hold_s": 0.0, "pickup_s": 0.0, "wait_s": 0.0, "batch_s": 6.0, "flushed": 0,
        "dropped": 0,
    }  # fmt: skip
    return {
        what: value | changes.pop(what, {}) if isinstance(value, dict) else value for what, value in version.items()
    } | changes


def test_figures_by_hand() -> None:
    cut = version_measurements(
        seconds={"proximal": 0.5, "cut": 1.0, "known": 0.1, "early": 0.8},
        cpu={"proximal": 0.5, "cut": 0.5, "early": 0.6, "train": 5.0},
        counts={"exact": 100, "scored_early": 60, "scored_at_cut": 30, "scored_in_step": 20},
        cut={"wait": 0.2, "read": 0.0, "score": 0.8, "stall": 1.0},
        hold_s=3.5,
    )
    average = version_measurements(seconds={"proximal": 1.0, "tick": 0.5, "distance": 0.5})
    interpolation = version_measurements(seconds={"passes": 3.5, "interpolate": 0.5})
    replica = version_measurements(
        seconds={"known": 2.0}, replica={"tokens": 90.0, "loads": 2.0, "load_s": 1.0, "pass_s": 1.0, "cpu_s": 2.5}
    )
    weights = {"copy": 1000, "other": 10, "values": 0}
    found = figures(
        {
            REFERENCE: [version_measurements()],
            "interruption": [cut] * 3,
            "ewma_prox": [average],
            "linear_prox": [interpolation],
            "replica": [replica],
        },
        dict.fromkeys((REFERENCE, "linear_prox", "replica"), weights)
        | {"interruption": weights | {"values": 400}, "ewma_prox": weights | {"other": 3010}},
    )
    reference, interruption = found[REFERENCE], found["interruption"]
    assert (reference["extra_step_share"], reference["stall_share"], reference["hold_share"]) == (0, 0, 0)
    assert reference["step_s"] == 4.0
    assert interruption["extra_step_share"] == 1.6 / 4
    assert interruption["extra_cpu_share"] == 1.0 / 4
    assert interruption["off_path_share"] == 0.8 / 4
    assert (interruption["stall_share"], interruption["hold_share"]) == (1 / 5, 3.5 / 5)
    assert interruption["hold_parts_s"] == {"cut": 1.0, "step": 1.0, "publish": 1.0, "rest": 0.5}
    assert set(reference["hold_parts_s"].values()) == {0.0}
    assert (interruption["weight_bytes_ratio"], interruption["value_bytes"]) == (0, 400)
    assert (interruption["scored_tokens"], interruption["exact_share"]) == (110, 1.0)
    assert interruption["staleness"] == {"0": 0.25, "1": 0.75}
    assert interruption["versions_per_trajectory"] == 1.5
    assert (found["ewma_prox"]["weight_bytes_ratio"], found["ewma_prox"]["extra_step_share"]) == (3.0, 0.5)
    assert (found["linear_prox"]["step_s"], found["linear_prox"]["extra_step_share"]) == (4.0, 0.125)
    assert (found["replica"]["scored_tokens"], found["replica"]["off_path_share"]) == (90, 0.5)
    assert all(targets(found).values())
    assert not any(targets({"interruption": interruption | {"weight_bytes_ratio": 1.0, "stall_share": 0.25}}).values())


def test_figures_are_medians_over_versions() -> None:
    versions = [version_measurements(seconds={"proximal": seconds}) for seconds in (1.0, 50.0, 2.0)]
    assert (
        figures({REFERENCE: versions}, {REFERENCE: {"copy": 1, "other": 0, "values": 0}})[REFERENCE]["extra_s"] == 2.0
    )


def test_workers_sample_at_the_pace_of_the_reference() -> None:
    pace = Pace(1.0)
    assert pace.batch_s(VARIANTS[0]) == ROLLOUT
    for seconds in (4.0, 6.0, 5.0):
        pace.trained(REFERENCE, {"seconds": {"passes": seconds - 1, "step": 1.0}})
        pace.trained("snapshot", {"seconds": {"passes": 100.0, "step": 1.0}})
    assert pace.batch_s(VARIANTS[0]) == 5 * ROLLOUT
    assert pace.batch_s(Variant("busy", {"kind": "interruption"}, rollout=0.5)) == 2.5


def test_the_figures_count_every_part_that_a_source_takes() -> None:
    toy = Toy(prompts=2, group=2, minibatches=1)
    trainer = ToyTrainer(toy, 0)
    batch = trainer.sample()
    surrogate = source("linear_prox", store=trainer.store, policy=trainer.policy, toy=toy)
    timer = VersionTimer()
    with ExitStack() as stack:
        instrument_source(stack, TrainingState(surrogate), timer)
        proximal = surrogate.proximal(batch.minibatches, trainer.now)
        mask = torch.from_numpy(batch.minibatches[0].mask)
        proximal.anchor(0, torch.zeros(mask.shape), mask)
    assert set(timer.seconds) == {"proximal", "interpolate"} <= set(ON_THE_PATH)


def test_cpu_time_of_a_process() -> None:
    before, own = cpu_s(os.getpid()), time.process_time()
    while time.process_time() < own + 0.2:
        pass
    assert 0.15 < cpu_s(os.getpid()) - before < 60  # threads of other tests count too


def test_every_kind_of_proximal_has_a_run(tmp_path: Path) -> None:
    kinds = set()
    for variant in VARIANTS:
        config = run_config(variant, LOAD, Place(tmp_path, tmp_path, 1, 2))
        file = tmp_path / f"{variant.name}.toml"
        file.write_text(to_toml(config))
        assert load_run([str(file)], {}, program="test").config == config
        kinds.add(config.learner.proximal.kind)
    assert kinds == {
        "snapshot", "replica", "interruption", "bypass", "current_recompute", "interp_prox_loglinear", "linear_prox",
        "ewma_prox", "ppo_ewma_async",
    }  # fmt: skip


def test_other_bytes_count_every_tensor_but_the_policys(tmp_path: Path) -> None:
    parameters = build_model(SHAPES["tiny"], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    policy = TrainablePolicy(model, OptimizerConfig())
    before = tensor_bytes(policy, ScoreStore())
    assert before["copy"] == 2 * parameters  # the tied head counts once
    policy.step()  # the optimizer's moments now exist and do not count
    assert tensor_bytes(policy, ScoreStore())["other"] == before["other"]
    shadow = copy.deepcopy(model).requires_grad_(False)
    buffers = sum(buffer.nbytes for buffer in shadow.buffers())
    assert tensor_bytes(policy, ScoreStore())["other"] - before["other"] == 2 * parameters + buffers
    del shadow
    source = EwmaProx(model, policy.masters, torch.device("cpu"), decay=0.5)
    assert tensor_bytes(policy, ScoreStore())["other"] - before["other"] == 4 * parameters
    del source
    assert tensor_bytes(policy, ScoreStore())["other"] == before["other"]


@pytest.mark.servers
def test_the_benchmark_measures_bytes_and_exact_shares() -> None:
    """Times are not checked."""
    command = [
        sys.executable, "-m", "bench", "routes", "--parameters=tiny", "--tokens=24", "--versions=1", "--part", "runs",
        "--only", "snapshot", "interruption", "ewma_prox"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    routes = result["routes"]
    assert list(routes) == [REFERENCE, "snapshot", "interruption", "ewma_prox"]
    for route in routes.values():
        assert route.keys() >= {
            "extra_step_share",
            "weight_bytes_ratio",
            "stall_share",
            "hold_share",
            "extra_cpu_share",
        }
        assert route["versions"] == 1
    assert {name: route["exact_share"] for name, route in routes.items()} == {
        REFERENCE: 0.0, "snapshot": 1.0, "interruption": 1.0, "ewma_prox": 0.0,
    }  # fmt: skip
    assert {name: round(route["weight_bytes_ratio"], 1) for name, route in routes.items()} == {
        REFERENCE: 0.0, "snapshot": 1.0, "interruption": 0.0, "ewma_prox": 3.0,
    }  # fmt: skip
    assert routes["interruption"]["hold_share"] >= routes["interruption"]["stall_share"] > 0
    assert routes["snapshot"]["scored_in_step_tokens"] <= routes["snapshot"]["trained_tokens"]
    assert routes["ewma_prox"]["scored_in_step_tokens"] == routes["ewma_prox"]["trained_tokens"]
    assert result["load_average"].keys() == {"before", "after"}
