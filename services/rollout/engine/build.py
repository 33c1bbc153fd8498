"""Builds the engine of a worker from its configuration."""

from palimpsest.common import run_folder
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.routes import route_shape
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import Engine
from palimpsest.services.rollout.seeds import engine_seed

FIRST_CANARY_TOKENS = 64
"""Length in tokens of the random canary sequence of the learner's first version."""


def build_engine(config: RunConfig, dialogue: ChatRenderer, longest: int, adapter: Adapter | None = None) -> Engine:
    """Return the engine, which is not started. longest: most tokens of a trajectory; adapter: what the versions are."""
    chosen = config.rollout.engine
    if isinstance(chosen, ScriptedEngineConfig):
        from palimpsest.services.rollout.engine.scripted import ScriptedEngine

        shape = route_shape(config.model.path) if config.learner.routing_replay == "engine" else None
        return ScriptedEngine(chosen, encode=dialogue.encode, routes=shape)
    from palimpsest.services.rollout.engine.vllm import VllmEngine

    return VllmEngine(
        chosen,
        model=config.model.path,
        max_tokens=max(longest, FIRST_CANARY_TOKENS) + 1,  # scoring samples one token
        max_live=config.rollout.max_live,
        seed=engine_seed(config.run.seed, config.rollout.worker),
        log=run_folder.engine_log_file(config.run.home, config.rollout.worker),
        adapter=adapter,
        routes=config.learner.routing_replay == "engine",
    )
