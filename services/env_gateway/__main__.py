"""python -m palimpsest.services.env_gateway RUN.toml"""

import os
from collections.abc import Iterable
from urllib.parse import urlsplit

from palimpsest.common.config import Invocation
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.session_environments import session_environments
from palimpsest.common.control.access import require_token_off_loopback
from palimpsest.common.control.credentials import SECRETS, open_access
from palimpsest.common.orphans import adopt_orphans
from palimpsest.common.program import service
from palimpsest.common.service import Stop, serve
from palimpsest.common.sessions.registry import built_in
from palimpsest.common.sessions.sessions import Sessions, limits_of
from palimpsest.common.user_error import ExitCode
from palimpsest.services.env_gateway import plugins
from palimpsest.services.env_gateway.adapters import entries as adapter_entries
from palimpsest.services.env_gateway.app import create_app
from palimpsest.services.env_gateway.child_limits import child_limits, log_limits
from palimpsest.services.env_gateway.code_tools import code_tools
from palimpsest.services.env_gateway.host_lists import permissions
from palimpsest.services.env_gateway.isolated import REASONING_GYM, reasoning_gym
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

WAIT_FOR_PROCESS_S = 2.0
"""Time limit for a new session to get a free process, in seconds; then it is refused with 429."""


def body(invocation: Invocation, stop: Stop) -> None:
    """Serve until a stop request."""
    config = invocation.config.env_gateway
    access = open_access(os.environ, config.host, urlsplit(config.url).hostname or "")
    require_token_off_loopback(config.host, access, key="env_gateway")
    for name in SECRETS:
        os.environ.pop(name, None)  # environments are third-party code and must not read the tokens
    limits, problem = child_limits(config)
    sandbox = code_tools(config, limits)
    adopt_orphans()
    permitted = permissions(config)
    adapters = adapter_entries.specs(config.adapters, taken={*built_in(), *config.plugins}, permissions=permitted)
    plugged_in = plugins.blueprints(config.plugins, taken=built_in(), permissions=permitted)
    pool = Pool(
        limit=config.max_processes,
        wait_s=WAIT_FOR_PROCESS_S,
        call_limit_s=config.step_limit_s,
        modules=(*_modules(invocation.config, plugged_in.values()), *adapter_entries.modules(config.adapters)),
        variables=plugins.variables(
            (*config.plugin_variables, *adapter_entries.variables(config.adapters)), os.environ
        ),
        adopts=True,
        limits=limits,
        code_tools=sandbox,
    )
    try:
        offered = {
            **built_in(),
            **reasoning_gym(pool),
            **plugins.entries(pool, plugged_in),
            **adapter_entries.entries(pool, adapters),
        }
        needed = session_environments(invocation.config)
        plugins.check_tasks(needed, offered)
        if any(offered[name].isolated for name in needed):
            pool.warm()
        if config.plugins or config.adapters:
            log_limits(limits, problem)
        sessions = Sessions(offered, limits_of(invocation.config))
        stop.on_request(sessions.refuse_new)
        app = create_app(
            sessions,
            offered,
            access=access,
            request_limit_bytes=config.request_limit_bytes,
            on_exit=pool.close,
            on_drained=lambda: stop.request(ExitCode.DONE),
        )
        serve(app, config.host, config.port, key="env_gateway", stop=stop)
    finally:
        pool.stop()


def _modules(config: RunConfig, plugged_in: Iterable[EnvironmentSpec]) -> tuple[str, ...]:
    """Return the modules that the fork server preloads: every plugin, and reasoning-gym if the run trains on it."""
    uses_reasoning_gym = any(name.startswith(REASONING_GYM) for name in session_environments(config))
    return (*sorted({blueprint.module for blueprint in plugged_in}), *(["reasoning_gym"] if uses_reasoning_gym else []))


if __name__ == "__main__":
    service("env_gateway", body)
