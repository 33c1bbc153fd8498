"""The environments of `env_gateway.plugins`. They are checked before the gateway listens, so errors appear at once."""

import difflib
import re
from collections.abc import Iterable, Mapping

from palimpsest.common.sessions.registry import Entry, Registry
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.host_lists import NO_PERMISSIONS, NetworkPermission
from palimpsest.services.env_gateway.isolated import REASONING_GYM, isolated
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def blueprints(
    plugins: Mapping[str, str], *, taken: Iterable[str], permissions: Mapping[str, NetworkPermission] = NO_PERMISSIONS
) -> dict[str, EnvironmentSpec]:
    """Read `env_gateway.plugins`. permissions: of those that reach something. Raises UserError."""
    for name, path in plugins.items():
        key = f"env_gateway.plugins.{name}"
        valid_name(key, name, taken)
        if not _PATH.fullmatch(path):
            raise UserError(f"{key}: {path!r} is not of the form package.module:Class")
    found = {name: permissions.get(name, NetworkPermission()) for name in plugins}
    return {
        name: EnvironmentSpec(path=path, network=found[name].network, hosts=found[name].hosts)
        for name, path in plugins.items()
    }


def valid_name(key: str, name: str, taken: Iterable[str]) -> None:
    """Check the name of a new environment. Raises UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{key}: a name has up to 64 of a-z, 0-9, _, . and -, and begins with a letter or digit")
    if name in taken or name.startswith(REASONING_GYM):
        raise UserError(f"{key}: there is an environment of this name already; choose another")


def variables(names: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Read `env_gateway.plugin_variables`. Raises UserError."""
    for name in names:
        if name.startswith("PALIMPSEST_"):
            raise UserError(f"env_gateway.plugin_variables: {name} is not for environments; remove it")
        if name not in environment:
            raise UserError(f"env_gateway.plugin_variables: the gateway has no environment variable {name}; set it")
    return tuple(names)


def entries(pool: Pool, specs: Mapping[str, EnvironmentSpec]) -> dict[str, Entry]:
    """Return every plugin, after a child has loaded and checked its class. Raises UserError."""
    found: dict[str, Entry] = {}
    for name, blueprint in specs.items():
        described = pool.describe(blueprint)
        if described.problem:
            raise UserError(
                f"env_gateway.plugins.{name}: {blueprint.path} cannot be used: {described.problem} "
                f'(docs/gateway.md, "your own environment", has one to start from)'
            )
        about = {"version": described.version, "description": described.description}
        found[name] = isolated(pool, name, blueprint, **about)
        for split in described.splits[1:]:
            if not _NAME.fullmatch(other := f"{name}.{split}") or other in specs:
                raise UserError(f"env_gateway.plugins.{name}: its split {split!r} cannot be named {other}; rename it")
            of_split = blueprint.model_copy(update={"arguments": (*blueprint.arguments, split)})
            found[other] = isolated(pool, other, of_split, **about)
    return found


def check_tasks(environments: Iterable[str], registry: Registry) -> None:
    """Check that the gateway has every environment of the run. Raises UserError."""
    for name in environments:
        if name not in registry:
            near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            if name.startswith(REASONING_GYM) and not any(known.startswith(REASONING_GYM) for known in registry):
                hint = "; reasoning-gym is not installed: install palimpsest with the extra [reasoning-gym]"
            raise UserError(
                f"tasks.environments: the gateway has no environment {name!r}{hint} "
                f"(built in: those that `palimpsest env list` prints; your own: env_gateway.plugins; "
                f"of other projects: env_gateway.adapters)"
            )
