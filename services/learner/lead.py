"""Rank 0's composition: everything that speaks to others is put together here."""

from common.bus.open import open_bus
from common.config.proximal import InterruptionProximal
from common.config.schema import RunConfig
from common.logs import logger
from common.messages import Sampling
from common.metrics import REGISTRY
from common.service import Starting, Stop, application
from common.snapshots.client import SnapshotClient
from common.snapshots.writer import Writer
from services.learner.bounds import Bounds
from services.learner.canaries import Canaries
from services.learner.checkpoint import Checkpoints
from services.learner.companions import Companions
from services.learner.history import History
from services.learner.intake import Arrived, Intake
from services.learner.loop import Loop
from services.learner.model import Trainee
from services.learner.old.scores import Scores
from services.learner.old.together import Pass, Together
from services.learner.planner import Planner
from services.learner.publisher import Publisher
from services.learner.ranks import Ranks
from services.learner.records import Recorder
from services.learner.routes import route
from services.learner.step import Step
from services.learner.teller import Teller


def lead(
    config: RunConfig,
    stop: Stop,
    store: SnapshotClient,
    trainee: Trainee,
    companions: Companions,
    step: Step,
    ranks: Ranks,
    one: Pass,
    server: Starting,
) -> None:
    """Run the loop until it is done or stopped. one: a forward pass by the trainee's model."""
    server.doing = "the log to be opened"
    learner, tasks, home = config.learner, config.tasks, config.run.home
    writer = Writer(store)
    bus = open_bus(config)
    planner: Planner[Arrived] = Planner(
        samples=tasks.samples_per_group,
        groups_per_batch=learner.groups_per_batch,
        max_staleness=learner.max_staleness,
        time_limit_s=tasks.time_limit_s,
    )
    scores = Scores()
    intake = Intake(
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
        ended=scores.forget,
    )
    exact = route(
        learner,
        run=config.run.id,
        bus=bus,
        intake=intake,
        score=Together(ranks, one),
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
        recorder=Recorder(home / "records") if learner.record else None,
        teller=Teller(Bounds.of(learner), home / "history.jsonl"),
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
