"""Rank 0: builds the objects that connect to other services, and runs the loop."""

from collections.abc import Callable, Sequence
from functools import partial

from palimpsest.common import run_folder
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.port import Bus
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.instruments import report_free_bytes
from palimpsest.common.logs import logger
from palimpsest.common.messages import Sampling
from palimpsest.common.routes import route_shape
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.buffer.task_sampler import TaskCounter
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints
from palimpsest.services.learner.control.build import all_routes, build_control
from palimpsest.services.learner.control.page_routes import PAGE_RULES
from palimpsest.services.learner.control.routes import RULES
from palimpsest.services.learner.evaluation.build import build_evaluator
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.gpu_cache import return_all_caches
from palimpsest.services.learner.ingest.build import build_ingest
from palimpsest.services.learner.ingest.offers import TaskSettings
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.loop import Loop
from palimpsest.services.learner.loop_parts import Outputs, Records, Training
from palimpsest.services.learner.model.policy import vocabulary_size
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.history import History, HistoryFollower
from palimpsest.services.learner.observability.page_feed import PageFeed
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.worker_watch import WorkerWatch
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, Pass
from palimpsest.services.learner.old_logprobs.routes import route
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.sharding.part_messages import MessageOrders
from palimpsest.services.learner.sharding.published_weights import CollectiveOrders, ShardedCanaries, ShardedWeights
from palimpsest.services.learner.sharding.shard_files import ShardFiles
from palimpsest.services.learner.sharding.shared_work import OnAllRanks
from palimpsest.services.learner.tracking.build import build_tracking


def run_coordinator(
    config: RunConfig,
    stop: Stop,
    store: SnapshotClient,
    training: Training,
    forward: Pass,
    server: Starting,
    adapter: Adapter | None = None,
) -> None:
    """Run the loop until all versions are done or a stop is requested. forward: scores with the policy; adapter: what
    the versions are, None: whole weights."""
    server.doing = "the log to be opened"
    learner, model = config.learner, training.policy.model
    writer, bus, scores = Writer(store), open_bus(config), ScoreStore()
    settings = _task_settings(config)
    tracking = build_tracking(config)
    evaluator = build_evaluator(config, settings.sampling, bus, store, writer, (tracking.of_evaluations,))
    ingest = build_ingest(
        bus,
        _ledger(config),
        settings,
        run=config.run.id,
        vocabulary=vocabulary_size(model),
        confirm=writer.confirm,
        epoch=lambda: writer.epoch,
        control=ControlCheck(store),
        evaluations=evaluator,
        keep_flushed=PROXIMAL_KINDS[learner.proximal.kind].cuts_workers,
        on_resolved=scores.forget,
        routes=route_shape(config.model.path) if learner.routing_replay == "engine" else None,
    )
    exact = route(
        learner,
        run=config.run.id,
        bus=bus,
        ingest=ingest,
        score=DistributedScorer(training.ranks, forward),
        scores=scores,
        confirm=writer.confirm,
        epoch=lambda: writer.epoch,
        control=ControlCheck(store),
        before_waking=_before_waking(config, training),
    )
    outputs = _outputs(config, training, bus, store, writer, evaluator, adapter)
    feed, watch = PageFeed(), WorkerWatch(lambda: open_bus(config), run=config.run.id)
    records = _records(config, (feed, tracking))
    desk, control = build_control(config, bus, store, outputs.publisher, writer)
    loop = Loop(config, training, ingest, exact, outputs, records, control, stop)
    seen = loop.status
    server.show_service(
        ready=seen.not_ready,
        status=seen.fields,
        waiting_for=lambda: seen.waiting_for,
        routes=all_routes(config, desk, control, seen, feed, watch),
        rules=(*RULES, *PAGE_RULES),
    )
    watch.start()
    try:
        loop.start()
        done = loop.run()
    except Fenced:
        desk.close("fenced", "another learner took over this run; send the request to it")
        raise
    finally:
        desk.close("ended", "the learner ends")
        loop.close()
        tracking.close()
        exact.release()  # if the learner ends inside a cut, no worker that has its memory must stay paused
    watch.close()
    exact.close()
    ingest.close()
    bus.close()
    logger().info("done" if done else "stopped", **ingest.ledger.counts())


def _ledger(config: RunConfig) -> TrajectoryLedger[ReceivedTrajectory]:
    learner = config.learner
    return TrajectoryLedger(
        samples=config.tasks.samples_per_group,
        groups_per_batch=learner.groups_per_batch,
        max_staleness=learner.max_staleness,
        time_limit_s=config.tasks.time_limit_s,
        max_overtaking=None if learner.max_overtaking == "unlimited" else learner.max_overtaking,
    )


def _outputs(
    config: RunConfig,
    training: Training,
    bus: Bus,
    store: SnapshotClient,
    writer: Writer,
    evaluator: Evaluator,
    adapter: Adapter | None,
) -> Outputs:
    """The writers of versions and checkpoints. With a sharded policy, all ranks take part; rank 0 has all of an
    adapter."""
    learner, shards, model = config.learner, training.shards, training.policy.model
    limits = {"trajectories": learner.canary_trajectories, "micro_batch_tokens": learner.micro_batch_tokens}
    canaries: Canaries
    weights: ShardedWeights | None = None
    files: ShardFiles | None = None
    if shards is None:
        canaries = Canaries(model, training.ranks.device, **limits)
    else:
        on_all_ranks = OnAllRanks(shards)
        canaries = ShardedCanaries(on_all_ranks, **limits)
        if (policy := shards.split_policy) is not None:
            messages, part = shards.messages, shards.part
            parts = CollectiveOrders(on_all_ranks) if messages is None else MessageOrders(messages, part)
            weights = ShardedWeights(on_all_ranks, parts, store, run=config.run.id)
            files = ShardFiles(on_all_ranks, policy)
    publisher = Publisher(
        bus, store, writer, model, canaries, run=config.run.id, weights=weights, adapter=adapter,
        free_memory=_before_waking(config, training),
    )  # fmt: skip
    report_free_bytes("checkpoints", config.checkpoint_folder)
    checkpoints = Checkpoints(
        config.checkpoint_folder, writer, keep=learner.checkpoint.keep, shards=files, adapter=adapter
    )
    return Outputs(writer, publisher, checkpoints, evaluator)


def _before_waking(config: RunConfig, training: Training) -> Callable[[], None] | None:
    """Return what must happen before each record that wakes engines; None if engines do not sleep."""
    return partial(return_all_caches, training.ranks) if config.rollout.engine.sleep else None


def _records(config: RunConfig, followers: Sequence[HistoryFollower]) -> Records:
    home = config.run.home
    return Records(
        open_history=lambda length: History(home / run_folder.HISTORY, length=length, followers=followers),
        dump=BatchDump(home / run_folder.RECORDS),
        reporter=VersionReporter(RunThresholds.of(config.learner), home / run_folder.HISTORY),
    )


def _task_settings(config: RunConfig) -> TaskSettings:
    tasks, sampling, limit = config.tasks, config.sampling, trajectory_limit(config)
    logger().info("trajectory limit", tokens=limit.tokens, source=limit.source)
    return TaskSettings(
        seed=config.run.seed,
        environments=tasks.environments,
        samples=tasks.samples_per_group,
        sampling=Sampling(
            temperature=sampling.temperature,
            max_turn_tokens=sampling.max_turn_tokens,
            max_trajectory_tokens=limit.tokens,
            max_turns=sampling.max_turns,
        ),
        time_limit_s=tasks.time_limit_s,
        counter=TaskCounter(config.run.seed, tasks.environments) if tasks.seeds == "counted" else None,
    )
