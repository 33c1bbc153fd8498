"""The learner as it is, in a process of its own, with a clock on everything that old log-probs cost it.

Nothing is put in its place: its parts are called through wrappers that note how long they took. It trains one version
for each turn it is given and stands still in between, so that others can be measured beside it.
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
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner import coordinator, instruments
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.loop import Training
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
"""before: scored ahead, while workers sample on; stall: the rest, from the request until the weights may change."""
SCORED = "palimpsest_learner_old_scored_tokens_total"
DROPPED = "palimpsest_learner_dropped_trajectories_total"
REASONS = ("over_staleness", "group_too_small", "deadline")
GO, WEIGH, END = "go", "weigh", "end"


class Over(Exception):
    """No turn comes any more."""


class Watch:
    """Seconds and counts of one version; begun anew with each turn."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was noted."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        """CPU seconds of this process, under the same names."""
        self.counts: Counter[str] = Counter()
        self.told: dict[str, Any] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the block's time under this name."""
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[what] += time.perf_counter() - began
        self.cpu[what] += time.process_time() - cpu

    def calling(self, what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The function's answer, its time counted."""
        with self.of(what):
            return function(*arguments, **named)

    def noted(self) -> dict[str, Any]:
        """Everything."""
        return {"seconds": dict(self.seconds), "cpu": dict(self.cpu), "counts": dict(self.counts), **self.told}


class CountingStore(SnapshotClient):
    """A store that counts what is fetched from it."""

    watch: Watch

    def tensors(self, manifest: Manifest) -> Iterator[RawTensor]:
        """See SnapshotClient."""
        self.watch.counts["loads"] += 1
        self.watch.counts["fetched_bytes"] += manifest.object_size
        return super().tensors(manifest)


class WatchedTrainer(Trainer):
    """A trainer that records the times and counts of each version."""

    watch: Watch

    def train(
        self,
        minibatches: Sequence[Sequence[Row]],
        now: Version,
        *,
        before_first_step: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """See Trainer."""
        with self.watch.of("train"):
            trained = super().train(minibatches, now, before_first_step=before_first_step)
        for part in ("passes", "step"):
            self.watch.seconds[part] += trained.seconds[part]
        exact = torch.tensor(0)
        ages: Counter[int] = Counter()
        for scored in trained.micro_batches:
            exact += (scored.anchor.exact & torch.from_numpy(scored.batch.mask)).sum()
            ages.update((now - scored.batch.versions[scored.batch.mask]).tolist())
        rows = [row for minibatch in minibatches for row in minibatch]
        self.watch.counts += Counter(
            exact=int(exact),
            trainable=ages.total(),
            tokens=sum(len(row.tokens) for row in rows),
            versions=sum(len(np.unique(row.versions[row.versions >= 0])) for row in rows),
            trajectories=len(rows),
        )
        self.watch.told["staleness"] = dict(ages)
        return trained


class WatchedRoute:
    """A route with a clock on each call, which tells of each version and waits for the next turn."""

    def __init__(self, inner: Route, watch: Watch, turns: "Turns") -> None:
        self._inner, self._watch, self._turns = inner, watch, turns
        self.start, self.release, self.close = inner.start, inner.release, inner.close

    def work(self, now: Version, digest: str) -> int:
        """See Route."""
        self._turns.wait()
        with self._watch.of("early"):
            tokens = self._inner.work(now, digest)
        self._watch.counts["scored_early"] += tokens
        return tokens

    def attach_old_logprobs(
        self, rows: Sequence[Row], now: Version, *, heartbeat: Callable[[], None], stop: Callable[[], bool]
    ) -> list[Row] | None:
        """See Route."""
        self._turns.wait()
        self._watch.told |= {"taken_at": time.monotonic(), "batch": [row.trajectory for row in rows]}
        with self._watch.of("known"):
            return self._inner.attach_old_logprobs(rows, now, heartbeat=heartbeat, stop=stop)

    def cut(self, now: Version, digest: str, *, training: Collection[str]) -> None:
        """See Route."""
        before = _cut_figures()
        with self._watch.of("cut"):
            self._inner.cut(now, digest, training=training)
        after = _cut_figures()
        took = {what: after[what] - before[what] for what in after}
        self._watch.counts["scored_early"] += int(took.pop("early"))  # before anyone stood still
        self._watch.counts["scored_at_cut"] += int(took.pop("cut"))
        self._watch.told["cut"] = took

    def published(self, version: Version, digest: str) -> None:
        """See Route."""
        with self._watch.of("published"):
            self._inner.published(version, digest)
        self._turns.trained()


class Turns:
    """Lets the learner train one version for each GO that comes."""

    def __init__(self, pipe: Connection, watch: Watch) -> None:
        self._pipe, self._watch, self._trained, self._begun = pipe, watch, True, False
        self.weigh: Callable[[], dict[str, int]] = dict

    def trained(self) -> None:
        """A version stands: tell what it took."""
        dropped = sum(REGISTRY.get_sample_value(DROPPED, {"reason": reason}) or 0.0 for reason in REASONS)
        self._pipe.send(self._watch.noted() | {"dropped": int(dropped)})
        self._trained = True

    def wait(self) -> None:
        """Return at once inside a turn, else at the beginning of the next. Raises Over."""
        if not self._trained:
            return
        if not self._begun:
            self._begun = True
            self._pipe.send({})  # ready
        while (asked := self._pipe.recv()) == WEIGH:
            self._pipe.send(self.weigh())
        if asked == END:
            raise Over
        self._watch.begin()
        self._watch.told["began_at"] = time.monotonic()
        self._trained = False


def learn(config: RunConfig, pipe: Connection) -> None:
    """A learner's process: everything as services/learner/__main__.py does it, with a watch on it."""
    logs.configure(config.run.id, config.logs.level, config.logs.format)
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    watch, ranks = Watch(), ProcessGroup()
    turns = Turns(pipe, watch)
    policy = TrainablePolicy(
        load_model(
            config.model.path,
            ranks.device,
            config.model.attention,
            logprob_chunk_tokens=config.learner.logprob_chunk_tokens,
        ),
        config.learner.optimizer,
    )
    with ExitStack() as stack:
        store = stack.enter_context(CountingStore(config.store_url, compression=config.snapshot_store.compression))
        state = build_training_state(
            config.learner, policy, store, ranks.device, on_load=lambda _: instruments.SNAPSHOT_LOADS.inc()
        )
        trainer = WatchedTrainer(
            policy, state, ranks, config.learner, length=config.sampling.max_trajectory_tokens, seed=config.run.seed
        )
        store.watch = trainer.watch = watch
        scores = ScoreStore()
        turns.weigh = lambda: weigh(policy, scores)
        watch_source(stack, state, watch)
        stack.enter_context(patch.object(coordinator, "ScoreStore", lambda: scores))
        stack.enter_context(
            patch.object(
                coordinator, "route", lambda config, **parts: WatchedRoute(route(config, **parts), watch, turns)
            )
        )
        publish = Publisher.publish

        def timed(publisher: Publisher, version: Version, *, now: float) -> Manifest:
            with watch.of("publish"):
                return publish(publisher, version, now=now)

        stack.enter_context(patch.object(Publisher, "publish", timed))
        try:
            one = model_scorer(policy.model, ranks.device)
            with Starting(
                "learner", config.learner.host, config.learner.port, key="learner", registry=REGISTRY
            ) as http:
                coordinator.run_coordinator(config, Stop(), store, Training(trainer, policy, state, ranks), one, http)
        except Over:
            pipe.close()


def watch_source(stack: ExitStack, state: TrainingState, watch: Watch) -> None:
    """Put a clock on the source of the proximal, and on what it does when a version was trained."""
    source = state.source
    whole = source.proximal

    def proximal(batches: Sequence[PaddedBatch], now: Version) -> Proximal:
        with watch.of("proximal"):
            given = whole(batches, now)
        watch.counts["scored_in_step"] += _scored(given, batches)
        if isinstance(given, Interpolated):  # made inside the passes, which are timed as a whole
            given = replace(given, interpolate=partial(watch.calling, "interpolate", given.interpolate))
        return given

    stack.enter_context(patch.object(source, "proximal", proximal))
    if state.stateful_source is not None:
        tick = partial(watch.calling, "tick", state.stateful_source.published)
        stack.enter_context(patch.object(source, "published", tick))
    if isinstance(source, EwmaProx | PpoEwmaAsync):
        distance = partial(watch.calling, "distance", source.average.distance)
        stack.enter_context(patch.object(source.average, "distance", distance))


def _scored(given: Proximal, batches: Sequence[PaddedBatch]) -> int:
    """Trainable tokens for which a forward pass gave the value."""
    if isinstance(given, Interpolated) or (isinstance(given, Surrogate) and given.method == "bypass"):
        return 0
    return sum(int((batch.mask & np.isnan(batch.old)).sum()) for batch in batches)


def _cut_figures() -> dict[str, float]:
    """Sums so far: seconds of all cuts by phase, and tokens scored early and at cuts."""
    seconds = {phase: REGISTRY.get_sample_value(CUT, {"phase": phase}) or 0.0 for phase in CUT_PHASES}
    return seconds | {when: REGISTRY.get_sample_value(SCORED, {"when": when}) or 0.0 for when in ("early", "cut")}


def weigh(policy: TrainablePolicy, scores: ScoreStore) -> dict[str, int]:
    """Bytes of one bf16 copy of the model (copy), of all tensors of this process but the policy's (other), and of the
    stored old log-probs (values)."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _of(policy)}
    other: dict[int, int] = {}
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in own:
                other[storage.data_ptr()] = storage.nbytes()
    return {
        "copy": sum(weight.nbytes for weight in named_weights(policy.model).values()),
        "other": sum(other.values()),
        "values": _array_bytes(vars(scores)),
    }


def _of(policy: TrainablePolicy) -> Iterator[Tensor]:
    """Model, masters, gradients, moments."""
    yield from policy.model.parameters()
    yield from policy.model.buffers()
    yield from policy.masters
    yield from policy.gradients()
    for moments in policy.optimizer.state.values():
        yield from (tensor for tensor in moments.values() if isinstance(tensor, Tensor))


def _array_bytes(thing: Any) -> int:
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    return sum(map(_array_bytes, thing.values())) if isinstance(thing, dict) else 0
