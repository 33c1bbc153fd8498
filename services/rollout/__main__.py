"""python -m palimpsest.services.rollout RUN.toml"""

import asyncio
import os
from contextlib import nullcontext

from palimpsest.common import run_folder
from palimpsest.common.base_model import own_adapter
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.config import Invocation
from palimpsest.common.config.proximal import InterruptionProximal
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.session_environments import agent_programs
from palimpsest.common.control.credentials import open_access
from palimpsest.common.control.drain import RULES, drain_routes
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.model_limits import refuse_limits, refuse_tokenizer
from palimpsest.common.program import service
from palimpsest.common.service import Starting, Stop
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.in_process import InProcessSessions
from palimpsest.common.sessions.placed import PlacedSessions, in_process
from palimpsest.common.sessions.registry import built_in
from palimpsest.common.sessions.sessions import Sessions, limits_of
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.held_name import HeldName
from palimpsest.common.startup_objects import freeze_startup_objects, without_collections
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.rollout.agents.endpoints import serving
from palimpsest.services.rollout.agents.runner import AgentRunner
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.build import build_engine
from palimpsest.services.rollout.engine.late_start import LateStart
from palimpsest.services.rollout.engine.port import Engine, EngineDead
from palimpsest.services.rollout.engine.required import required
from palimpsest.services.rollout.trajectory_sampler import Tally, TrajectorySampler
from palimpsest.services.rollout.weights import WeightSync
from palimpsest.services.rollout.worker import Worker

ENVIRONMENT_MARGIN_S = 30.0
"""The client's timeout is this many seconds longer than the gateway's limit for a step."""


def body(invocation: Invocation, stop: Stop) -> None:
    """Sample trajectories until the run ends or the process receives a stop request."""
    rollout = invocation.config.rollout
    refuse_limits(invocation.config)
    access = open_access(os.environ, rollout.host)
    with Starting("rollout", rollout.host, rollout.port, key="rollout", registry=REGISTRY, access=access) as server:
        asyncio.run(_work(invocation.config, stop, server))


async def _work(config: RunConfig, stop: Stop, server: Starting) -> None:
    rollout = config.rollout
    with without_collections():  # imports transformers
        dialogue = ChatRenderer.load(
            config.model.path, dict(config.model.chat_template_options), config.model.chat_template
        )
        refuse_tokenizer(config.model.path, template=dialogue.template)
    limit = trajectory_limit(config)
    adapter = own_adapter(config)
    engine: Engine = build_engine(config, dialogue, limit.tokens, adapter)
    if rollout.engine.sleep:
        engine = LateStart(engine)
    server.doing = "the log to be opened"
    bus = open_bus(config)
    async with _sessions(config) as sessions:
        agents = AgentRunner(agent_programs(config), sessions)
        with (
            serving(agents) if rollout.agents else nullcontext(),
            SnapshotClient(config.store_url, ca_file=config.snapshot_store.ca_file) as store,
        ):
            weights = WeightSync(
                engine,
                store,
                run_folder.cache_folder(config.run.home, rollout.worker),
                tolerance=rollout.canary_tolerance,
                report=lambda applied: worker.report_update(applied),
                shared=run_folder.objects_folder(config.run.home),
                adapter=adapter,
            )
            sampler = TrajectorySampler(
                rollout.worker, engine, sessions, dialogue, rollout.attempts, Tally(), weights.wait_verified,
                agents=agents,
            )  # fmt: skip
            worker = Worker(
                run=config.run.id, name=rollout.worker, bus=bus, sampler=sampler, weights=weights,
                max_live=rollout.max_live, limit=limit, samples=config.tasks.samples_per_group,
                versions=config.learner.versions,
                evaluation_samples=config.evaluation.samples if config.evaluation.every else 0,
                control=ControlCheck(store), hold_s=_hold_s(config), sleeps=rollout.engine.sleep,
            )  # fmt: skip
            loop = asyncio.get_running_loop()

            def leave() -> None:
                loop.call_soon_threadsafe(worker.stop)

            stop.on_request(leave)
            server.doing = "its name"
            held = HeldName(
                store,
                "rollout",
                rollout.worker,
                key="rollout.worker",
                on_lost=lambda error: loop.call_soon_threadsafe(worker.fail, error),
                pause=stop.wait,
            )
            try:
                with held:
                    server.show_service(
                        ready=worker.not_ready,
                        status=worker.status,
                        waiting_for=worker.waiting_for,
                        routes=drain_routes(lambda: stop.request(ExitCode.DONE), lambda: worker.alive().live),
                        rules=RULES,
                    )
                    with required("to start"):
                        await engine.start()
                    freeze_startup_objects()
                    if not stop.requested:
                        await worker.work()
            except EngineDead as error:
                # No task is lost: requests in flight were not committed, so another worker samples them again.
                raise UserError(str(error), ExitCode.ENGINE) from None
            finally:
                await engine.close()
                bus.close()


def _hold_s(config: RunConfig) -> float | None:
    """Time limit of the wait at a cut, if the run has cuts and the file a limit."""
    proximal = config.learner.proximal
    return proximal.hold_s if isinstance(proximal, InterruptionProximal) else None


def _sessions(config: RunConfig) -> PlacedSessions:
    gateway = SessionClient(
        config.gateway_url,
        timeout_s=config.env_gateway.step_limit_s + ENVIRONMENT_MARGIN_S,
        connections=config.rollout.max_live,
    )
    local = InProcessSessions(Sessions(built_in(), limits_of(config)))
    return PlacedSessions(local, gateway, in_process=in_process(config))


if __name__ == "__main__":
    service("rollout", body)
