"""`env_gateway.child_network` and `env_gateway.child_hosts`: what the sessions of an environment reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.proxy.addresses import PermittedHosts, address


@dataclass(frozen=True, slots=True)
class NetworkPermission:
    """What the processes of an environment reach."""

    network: bool = False
    """The whole network of the gateway's machine."""
    hosts: PermittedHosts | None = None


NO_PERMISSIONS: Mapping[str, NetworkPermission] = MappingProxyType({})


def permissions(config: EnvGatewayConfig) -> dict[str, NetworkPermission]:
    """Return the permission of each plugin and adapter. Raises UserError."""
    known = {**dict.fromkeys(config.plugins, ""), **{name: one.url for name, one in config.adapters.items()}}
    for key, names in (("child_network", config.child_network), ("child_hosts", config.child_hosts)):
        if unknown := sorted(set(names) - set(known)):
            raise UserError(
                f"env_gateway.{key}: there is no plugin or adapter {unknown[0]!r}; name those of "
                f"env_gateway.plugins and env_gateway.adapters"
            )
    for name in config.child_hosts:
        key = f"env_gateway.child_hosts.{name}"
        if name in config.child_network:
            raise UserError(f"{key}: env_gateway.child_network gives it the whole network; remove one of the two")
        if known[name]:
            raise UserError(f"{key}: an adapter with a url may use the network, to speak to its server; remove the key")
    return {
        name: NetworkPermission(name in config.child_network or bool(url), _hosts(name, config.child_hosts.get(name)))
        for name, url in known.items()
    }


def _hosts(name: str, texts: tuple[str, ...] | None) -> PermittedHosts | None:
    """Read one list. Raises UserError."""
    if texts is None:
        return None
    key = f"env_gateway.child_hosts.{name}"
    if not texts:
        raise UserError(f"{key}: it names no host; remove the key, and the environment has no network")
    try:
        return PermittedHosts(environment=name, addresses=tuple(address(text) for text in texts))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
