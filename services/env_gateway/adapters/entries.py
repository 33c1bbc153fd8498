"""The environments of `env_gateway.adapters`: each is checked in a child before the gateway listens."""

from collections.abc import Iterable, Mapping

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.sessions.registry import Entry
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.host_lists import NO_PERMISSIONS, NetworkPermission
from palimpsest.services.env_gateway.isolated import isolated
from palimpsest.services.env_gateway.plugins import valid_name
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

FOLDER = "palimpsest.services.env_gateway.adapters"
CLASSES: Mapping[str, str] = {
    "mcp": "mcp_tools:McpTools",
    "ors": "ors:OrsEnvironment",
    "openenv": "openenv_session:OpenEnvSession",
    "nemo_gym": "nemo_gym_server:NemoGymServer",
    "gymnasium": "gymnasium_text:GymnasiumText",
    "textarena": "textarena_game:TextArenaGame",
    "skyrl_gym": "skyrl_gym_task:SkyRlGymTask",
    "tau2": "tau2_task:Tau2Task",
    "vitabench": "vitabench_task:VitaBenchTask",
}
"""Kind -> module and class in this folder."""
FIRST_CLIENT = ("encodings.idna", "httpcore")
"""Modules that httpx loads with its first client and its first connection."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "mcp": (f"{FOLDER}.mcp_http", "httpcore2", "anyio._backends._asyncio"),
    "ors": FIRST_CLIENT,
    "nemo_gym": FIRST_CLIENT,
    "openenv": ("websockets.sync.client",),
    "gymnasium": ("gymnasium",),
    "textarena": ("textarena",),
    "skyrl_gym": ("skyrl_gym",),
    "tau2": (f"{FOLDER}.tau2_imports",),
    "vitabench": (f"{FOLDER}.vitabench_imports",),
}
"""Kind -> modules that the fork server loads once for all sessions."""


def specs(
    adapters: Mapping[str, AdapterConfig],
    *,
    taken: Iterable[str],
    permissions: Mapping[str, NetworkPermission] = NO_PERMISSIONS,
) -> dict[str, EnvironmentSpec]:
    """Read `env_gateway.adapters`. permissions: without one, a url gives the network. Raises UserError."""
    found = {}
    for name, config in adapters.items():
        valid_name(f"env_gateway.adapters.{name}", name, taken)
        permitted = permissions.get(name, NetworkPermission(network=bool(config.url)))
        path = f"{FOLDER}.{CLASSES[config.kind]}"
        found[name] = EnvironmentSpec(
            path=path,
            arguments=(config.model_dump_json(),),
            closes=True,
            network=permitted.network,
            hosts=permitted.hosts,
        )
    return found


def modules(adapters: Mapping[str, AdapterConfig]) -> tuple[str, ...]:
    """Return the modules to load before the sessions are forked."""
    own = {f"{FOLDER}.{CLASSES[config.kind].partition(':')[0]}" for config in adapters.values()}
    tasks = {config.tasks.partition(":")[0] for config in adapters.values() if config.kind == "mcp" and config.tasks}
    packages = {name for config in adapters.values() for name in PACKAGES.get(config.kind, ())}
    return (*sorted(own), *sorted(packages), *sorted(tasks))


def variables(adapters: Mapping[str, AdapterConfig]) -> tuple[str, ...]:
    """Return the names of the environment variables with tokens."""
    named = {(config.token_variable, config.judge_token_variable) for config in adapters.values()}
    return tuple(sorted({variable for pair in named for variable in pair if variable}))


def entries(pool: Pool, adapters: Mapping[str, EnvironmentSpec]) -> dict[str, Entry]:
    """Return every adapter, after a child has begun and ended a session. Raises UserError."""
    found: dict[str, Entry] = {}
    for name, spec in adapters.items():
        described = pool.describe(spec)
        if described.problem:
            raise UserError(f"env_gateway.adapters.{name}: {described.problem} (docs/adapters.md)")
        found[name] = isolated(pool, name, spec, version=described.version, description=described.description)
    return found
