"""The environments that `palimpsest env` finds: the built-in ones, and those that a run file adds."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.common.config import RunConfig
from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.sessions.registry import Entry, Registry, built_in
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway import plugins
from palimpsest.services.env_gateway.adapters import entries as adapter_entries
from palimpsest.services.env_gateway.child_limits import child_limits, log_limits
from palimpsest.services.env_gateway.code_tools import code_tools
from palimpsest.services.env_gateway.host_lists import permissions
from palimpsest.services.env_gateway.isolated import reasoning_gym
from palimpsest.services.env_gateway.processes.pool import Pool

PROCESSES = 8
"""Two sessions side by side, and earlier ones whose adapters are closing."""
START_WAIT_S = 30.0


@contextmanager
def offered(config: RunConfig | None, *, serving: bool = False) -> Iterator[tuple[Pool, Registry]]:
    """Yield a pool and the built-in and plugged-in environments. Raises UserError.

    serving: other programs use them, so processes have the number and the limits that the gateway would give them.
    """
    gateway = config.env_gateway if config else EnvGatewayConfig()
    limits, problem = child_limits(gateway) if serving else (None, "")
    if limits is not None and (gateway.plugins or gateway.adapters):
        log_limits(limits, problem)
    families = built_in()
    permitted = permissions(gateway)
    blueprints = plugins.blueprints(gateway.plugins, taken=families, permissions=permitted)
    adapters = adapter_entries.specs(gateway.adapters, taken={*families, *gateway.plugins}, permissions=permitted)
    own = sorted({blueprint.module for blueprint in blueprints.values()})
    modules = (*own, *adapter_entries.modules(gateway.adapters))
    pool = Pool(
        limit=gateway.max_processes if serving else PROCESSES,
        wait_s=START_WAIT_S,
        call_limit_s=gateway.step_limit_s,
        modules=modules,
        variables=plugins.variables(
            (*gateway.plugin_variables, *adapter_entries.variables(gateway.adapters)), os.environ
        ),
        limits=limits,
        code_tools=code_tools(gateway, limits),
    )
    try:
        yield (
            pool,
            {
                **families,
                **reasoning_gym(pool),
                **plugins.entries(pool, blueprints),
                **adapter_entries.entries(pool, adapters),
            },
        )
    finally:
        pool.stop()


def found(name: str, entries: Registry) -> Entry:
    """Return the environment `name`. Raises UserError, which suggests the nearest name."""
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}?" if near else "`palimpsest env list` prints all names."
    raise UserError(
        f"there is no environment {name!r}; {meant} To use your own environment, pass the RUN.toml that adds it"
    )
