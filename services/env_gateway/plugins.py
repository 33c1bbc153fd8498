"""The environments a person plugs in: looked at before the gateway listens, so that a mistake is refused at once."""

import difflib
import re
from collections.abc import Iterable, Mapping

from palimpsest.common.user_error import Refusal
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import Blueprint
from palimpsest.services.env_gateway.registry import REASONING_GYM, Entry, Registry, isolated

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def blueprints(plugins: Mapping[str, str], *, taken: Iterable[str]) -> dict[str, Blueprint]:
    """Read `env_gateway.plugins`. Raises Refusal."""
    for name, path in plugins.items():
        key = f"env_gateway.plugins.{name}"
        if not _NAME.fullmatch(name):
            raise Refusal(f"{key}: a name is made of a-z, 0-9, _, . and -, begins with a letter or digit, up to 64")
        if name in taken or name.startswith(REASONING_GYM):
            raise Refusal(f"{key}: an environment of this name comes with Palimpsest; choose another")
        if not _PATH.fullmatch(path):
            raise Refusal(f"{key}: {path!r} is not of the form package.module:Class")
    return {name: Blueprint(path=path) for name, path in plugins.items()}


def entries(pool: Pool, wanted: Mapping[str, Blueprint]) -> dict[str, Entry]:
    """Every plugin, once its class has been loaded in a child and found usable. Raises Refusal."""
    found: dict[str, Entry] = {}
    for name, blueprint in wanted.items():
        described = pool.describe(blueprint)
        if described.problem:
            raise Refusal(
                f"env_gateway.plugins.{name}: {blueprint.path} cannot be used: {described.problem} "
                f'(docs/gateway.md, "your own environment", has one to start from)'
            )
        found[name] = isolated(pool, name, blueprint, version=described.version, description=described.description)
    return found


def check_tasks(environments: Iterable[str], registry: Registry) -> None:
    """Every environment a run trains on is on offer. Raises Refusal."""
    for name in environments:
        if name not in registry:
            near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Refusal(
                f"tasks.environments: the gateway has no environment {name!r}{hint} "
                f"(built in: lookup, hop, add, reasoning_gym.DATASET; your own: env_gateway.plugins)"
            )
