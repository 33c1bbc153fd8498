"""The real learner in its own process, with timers around every part that old log-probs need.

No part is replaced: wrappers call the parts and measure their time. The learner trains one version in each turn and
waits between turns, so that other learners can be measured in turn on the same machine.
"""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from palimpsest.common import logs
from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.common.versions import Version
from palimpsest.services.learner import coordinator, instruments
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.loop_parts import Training
from palimpsest.services.learner.model.policy import load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
from palimpsest.services.learner.old_logprobs.routes import Route, route
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.types import Interpolated, Proximal, Surrogate
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer

CUT = "palimpsest_learner_cut_seconds_sum"
CUT_PHASES = ("before", "wait", "read", "score", "stall")
"""before: early scoring while workers sample; stall: the time from the request until the weights may change."""
SCORED = "palimpsest_learner_old_scored_tokens_total"
DROPPED = "palimpsest_learner_dropped_trajectories_total"
REASONS = ("over_staleness", "group_too_small", "deadline")
GO, TENSOR_BYTES, END = "go", "tensor_bytes", "end"
"""Commands to the learner."""


class NoMoreTurns(Exception):
    """The benchmark has ended."""


class VersionTimer:
    """Seconds and counts of one version. Each turn resets them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all measurements."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        """CPU seconds of this process by part."""
        self.counts: Counter[str] = Counter()
        self.values: dict[str, Any] = {}
        """Other measurements by name."""

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the block to this part."""
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[part] += time.perf_counter() - began
        self.cpu[part] += time.process_time() - cpu

    def timed_call(self, part: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call the function and add its time to this part. Returns its result."""
        with self.time(part):
            return function(*arguments, **named)

    def measurements(self) -> dict[str, Any]:
        """Return all measurements by name."""
        return {"seconds": dict(self.seconds), "cpu": dict(self.cpu), "counts": dict(self.counts), **self.values}


class CountingStore(SnapshotClient):
    """A client of the store that counts loaded snapshots and their bytes."""

    timer: VersionTimer

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See SnapshotClient."""
        self.timer.counts["loads"] += 1
        self.timer.counts["fetched_bytes"] += manifest.object_size
        with super().object(manifest) as chunks:
            yield chunks


class InstrumentedTrainer(Trainer):
    """A trainer that records the times and counts of each version."""

    timer: VersionTimer

    def train(
        self,
        minibatches: Sequence[Sequence[Row]],
        now: Version,
        *,
        before_first_step: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See Trainer."""
        with self.timer.time("train"):
            trained = super().train(minibatches, now, before_first_step=before_first_step)
        for part in ("passes", "step"):
            self.timer.seconds[part] += trained.seconds[part]
        exact = torch.tensor(0)
        ages: Counter[int] = Counter()
        for scored in trained.micro_batches:
            exact += (scored.anchor.exact & torch.from_numpy(scored.batch.mask)).sum()
            ages.update((now - scored.batch.versions[scored.batch.mask]).tolist())
        rows = [row for minibatch in minibatches for row in minibatch]
        self.timer.counts += Counter(
            exact=int(exact),
            trainable=ages.total(),
            tokens=sum(len(row.tokens) for row in rows),
            versions=sum(len(np.unique(row.versions[row.versions >= 0])) for row in rows),
            trajectories=len(rows),
        )
        self.timer.values["staleness"] = dict(ages)
        return trained


class InstrumentedRoute:
    """A route that times each call, reports each version and waits for the next turn."""

    def __init__(self, inner: Route, timer: VersionTimer, turns: "Turns") -> None:
        self._inner, self._timer, self._turns = inner, timer, turns
        self.start, self.release, self.close = inner.start, inner.release, inner.close
        self.take_turn, self.cut_now = inner.take_turn, inner.cut_now

    def work(self, now: Version, digest: str) -> int:
        """See Route."""
        self._turns.wait()
        with self._timer.time("early"):
            tokens = self._inner.work(now, digest)
        self._timer.counts["scored_early"] += tokens
        return tokens

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """See Route."""
        self._turns.wait()
        self._timer.values |= {"taken_at": time.monotonic(), "batch": [row.trajectory for row in rows]}
        with self._timer.time("known"):
            return self._inner.attach_old_logprobs(rows, now, heartbeat=heartbeat, stop=stop)

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        """See Route."""
        before = _cut_figures()
        with self._timer.time("cut"):
            self._inner.cut(now, digest, training=training)
        after = _cut_figures()
        added = {name: after[name] - before[name] for name in after}
        self._timer.counts["scored_early"] += int(added.pop("early"))  # before the workers paused
        self._timer.counts["scored_at_cut"] += int(added.pop("cut"))
        self._timer.values["cut"] = added

    def published(self, version: Version, digest: str) -> None:
        """See Route."""
        with self._timer.time("published"):
            self._inner.published(version, digest)
        self._turns.trained()


class Turns:
    """Lets the learner train one version for each GO."""

    def __init__(self, pipe: Connection, timer: VersionTimer) -> None:
        self._pipe, self._timer, self._trained, self._begun = pipe, timer, True, False
        self.tensor_bytes: Callable[[], dict[str, int]] = dict
        """Answer to TENSOR_BYTES."""

    def trained(self) -> None:
        """Send the measurements of the trained version."""
        dropped = sum(REGISTRY.get_sample_value(DROPPED, {"reason": reason}) or 0.0 for reason in REASONS)
        self._pipe.send(self._timer.measurements() | {"dropped": int(dropped)})
        self._trained = True

    def wait(self) -> None:
        """Return immediately during a turn, else at the start of the next turn. Raises NoMoreTurns."""
        if not self._trained:
            return
        if not self._begun:
            self._begun = True
            self._pipe.send({})  # ready
        while (command := self._pipe.recv()) == TENSOR_BYTES:
            self._pipe.send(self.tensor_bytes())
        if command == END:
            raise NoMoreTurns
        self._timer.reset()
        self._timer.values["began_at"] = time.monotonic()
        self._trained = False


def learn(config: RunConfig, pipe: Connection) -> None:
    """Run the process of a learner: like services/learner/__main__.py, with timers."""
    logs.configure(config.run.id, config.logs.level, config.logs.format)
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    timer, ranks = VersionTimer(), ProcessGroup()
    turns = Turns(pipe, timer)
    policy = TrainablePolicy(
        load_model(
            config.model.path,
            ranks.device,
            config.model.attention,
            logprob_chunk_tokens=config.learner.logprob_chunk_tokens,
            layout=config.learner.layout,
        ),
        config.learner.optimizer,
    )
    with ExitStack() as stack:
        store = stack.enter_context(CountingStore(config.store_url, compression=config.snapshot_store.compression))
        state = build_training_state(
            config.learner, policy, store, ranks.device, on_load=lambda _: instruments.SNAPSHOT_LOADS.inc()
        )
        trainer = InstrumentedTrainer(
            policy, state, ranks, config.learner, length=trajectory_limit(config).tokens, seed=config.run.seed
        )
        store.timer = trainer.timer = timer
        scores = ScoreStore()
        turns.tensor_bytes = lambda: tensor_bytes(policy, scores)
        instrument_source(stack, state, timer)
        stack.enter_context(patch.object(coordinator, "ScoreStore", lambda: scores))

        def timed_route(config: LearnerConfig, **parts: Any) -> Route:
            return InstrumentedRoute(route(config, **parts), timer, turns)

        stack.enter_context(patch.object(coordinator, "route", timed_route))
        publish = Publisher.publish

        def timed(publisher: Publisher, version: Version, *, now: float, **options: Any) -> Manifest:
            with timer.time("publish"):
                return publish(publisher, version, now=now, **options)

        stack.enter_context(patch.object(Publisher, "publish", timed))
        try:
            scorer = model_scorer(policy.model, ranks.device)
            training = Training(trainer, policy, state, ranks)
            with Starting(
                "learner", config.learner.host, config.learner.port, key="learner", registry=REGISTRY
            ) as http:
                coordinator.run_coordinator(config, Stop(), store, training, scorer, http)
        except NoMoreTurns:
            pipe.close()


def instrument_source(stack: ExitStack, state: TrainingState, timer: VersionTimer) -> None:
    """Time the source of the proximal and its work after a trained version, until the stack closes."""
    source = state.source
    original = source.proximal

    def proximal(batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Proximal:
        with timer.time("proximal"):
            result = original(batches, now, fresh)
        timer.counts["scored_in_step"] += _scored(result, batches)
        if isinstance(result, Interpolated):  # computed inside the passes; their time is measured as a whole
            result = replace(result, interpolate=partial(timer.timed_call, "interpolate", result.interpolate))
        return result

    stack.enter_context(patch.object(source, "proximal", proximal))
    if state.stateful_source is not None:
        tick = partial(timer.timed_call, "tick", state.stateful_source.published)
        stack.enter_context(patch.object(source, "published", tick))
    if isinstance(source, EwmaProx | PpoEwmaAsync):
        distance = partial(timer.timed_call, "distance", source.average.distance)
        stack.enter_context(patch.object(source.average, "distance", distance))


def _scored(proximal: Proximal, batches: Sequence[PaddedBatch]) -> int:
    """Return the number of trainable tokens whose value comes from a forward pass of the source."""
    if isinstance(proximal, Interpolated) or (isinstance(proximal, Surrogate) and proximal.method == "bypass"):
        return 0
    shared = 0 if proximal.shared is None else sum(int(own.sum()) for own in proximal.shared)
    return sum(int((batch.mask & np.isnan(batch.old)).sum()) for batch in batches) - shared


def _cut_figures() -> dict[str, float]:
    """Return the sums so far: seconds of all cuts by phase, and tokens scored early and at cuts."""
    seconds = {phase: REGISTRY.get_sample_value(CUT, {"phase": phase}) or 0.0 for phase in CUT_PHASES}
    return seconds | {when: REGISTRY.get_sample_value(SCORED, {"when": when}) or 0.0 for when in ("early", "cut")}


def tensor_bytes(policy: TrainablePolicy, scores: ScoreStore) -> dict[str, int]:
    """Return the bytes of one bf16 copy of the model (copy), of all tensors of this process except those of the policy
    and its optimizer (other), and of the stored old log-probs (values)."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _policy_tensors(policy)}
    other: dict[int, int] = {}
    gc.collect()
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Tensor):
            storage = candidate.untyped_storage()
            if storage.data_ptr() not in own:
                other[storage.data_ptr()] = storage.nbytes()
    return {
        "copy": sum(weight.nbytes for weight in named_weights(policy.model).values()),
        "other": sum(other.values()),
        "values": _array_bytes(vars(scores)),
    }


def _policy_tensors(policy: TrainablePolicy) -> Iterator[Tensor]:
    """Iterate over the tensors of model, masters, gradients and moments."""
    yield from policy.model.parameters()
    yield from policy.model.buffers()
    yield from policy.masters
    yield from policy.gradients()
    for moments in policy.optimizer.state.values():
        yield from (tensor for tensor in moments.values() if isinstance(tensor, Tensor))


def _array_bytes(value: Any) -> int:
    """Return the bytes of an array, or of all arrays in nested dictionaries."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(_array_bytes, value.values())) if isinstance(value, dict) else 0
