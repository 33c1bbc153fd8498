"""Rank 0's composition: everything that speaks to others is put together here."""

from palimpsest.common.bus.factory import open_bus
from palimpsest.common.config.proximal import InterruptionProximal
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.logs import logger
from palimpsest.common.messages import Sampling
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Starting, Stop, application
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.checkpointing.checkpoints import Checkpoints
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory, TrajectoryReader
from palimpsest.services.learner.loop import Loop
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alerts import VersionReporter
from palimpsest.services.learner.observability.batch_dump import BatchDump
from palimpsest.services.learner.observability.history import History
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, Pass
from palimpsest.services.learner.old_logprobs.routes import route
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.publishing.publisher import Publisher
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer


def run_coordinator(
    config: RunConfig,
    stop: Stop,
    store: SnapshotClient,
    trainee: TrainablePolicy,
    companions: TrainingState,
    step: Trainer,
    ranks: ProcessGroup,
    forward: Pass,
    server: Starting,
) -> None:
    """Run the loop until it is done or stopped. one: a forward pass by the trainee's model."""
    server.doing = "the log to be opened"
    learner, tasks, home = config.learner, config.tasks, config.run.home
    writer = Writer(store)
    bus = open_bus(config)
    planner: TrajectoryLedger[ReceivedTrajectory] = TrajectoryLedger(
        samples=tasks.samples_per_group,
        groups_per_batch=learner.groups_per_batch,
        max_staleness=learner.max_staleness,
        time_limit_s=tasks.time_limit_s,
    )
    scores = ScoreStore()
    intake = TrajectoryReader(
        bus,
        planner,
        run=config.run.id,
        seed=config.run.seed,
        environments=tasks.environments,
        samples=tasks.samples_per_group,
        sampling=_sampling(config),
        time_limit_s=tasks.time_limit_s,
        confirm=writer.confirm,
        keep_flushed=isinstance(learner.proximal, InterruptionProximal),
        on_resolved=scores.forget,
    )
    exact = route(
        learner,
        run=config.run.id,
        bus=bus,
        intake=intake,
        score=DistributedScorer(ranks, forward),
        scores=scores,
        confirm=writer.confirm,
    )
    canaries = Canaries(trainee.model, ranks.device, trajectories=learner.canary_trajectories)
    loop = Loop(
        run=config.run.id,
        seed=config.run.seed,
        samples=tasks.samples_per_group,
        config=learner,
        step=step,
        trainee=trainee,
        companions=companions,
        planner=planner,
        intake=intake,
        writer=writer,
        publisher=Publisher(bus, store, writer, trainee.model, canaries, run=config.run.id),
        route=exact,
        checkpoints=Checkpoints(config.checkpoint_folder, writer, keep=learner.checkpoint.keep),
        open_history=lambda length: History(home / "history.jsonl", length=length),
        recorder=BatchDump(home / "records") if learner.record else None,
        teller=VersionReporter(RunThresholds.of(learner), home / "history.jsonl"),
        ranks=ranks,
        stop=stop,
    )  # fmt: skip
    server.show(application("learner", registry=REGISTRY, ready=loop.waiting_for, status=loop.status))
    try:
        loop.start()
        done = loop.run()
    finally:
        exact.release()  # whatever ends this learner inside a cut, no worker is to stand still for it
    exact.close()
    intake.close()
    bus.close()
    logger().info("done" if done else "stopped", **loop.status()["trajectories"])


def _sampling(config: RunConfig) -> Sampling:
    sampling = config.sampling
    return Sampling(
        temperature=sampling.temperature,
        max_turn_tokens=sampling.max_turn_tokens,
        max_trajectory_tokens=sampling.max_trajectory_tokens,
        max_turns=sampling.max_turns,
    )
