"""The limits of sessions in processes of their own, by the configuration and by what the machine permits."""

import os

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.logs import logger
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.processes.confinement import ChildLimits, available


def child_limits(config: EnvGatewayConfig) -> tuple[ChildLimits, str]:
    """Return the limits, and why some are missing; an empty text if all are enforced.

    Raises UserError if the configuration demands more than the machine permits.
    """
    if config.child_user is not None and os.geteuid() != 0:
        raise UserError("env_gateway.child_user: only a gateway that runs as root can change the user; remove the key")
    found = available(config.child_user)
    if config.isolation == "required" and found.problem:
        raise UserError(
            f'env_gateway.isolation is "required", but {found.problem}. Set env_gateway.child_user if the gateway runs '
            f'as root, permit user namespaces otherwise, or set env_gateway.isolation to "available"'
        )
    if config.child_hosts and not found.network:
        raise UserError(
            f"env_gateway.child_hosts: {found.problem}, so the network cannot be taken from a session. Permit user "
            f"namespaces, or name the environment in env_gateway.child_network, which gives it the whole network"
        )
    limits = ChildLimits(
        memory_mib=config.child_memory_mib,
        processes=config.child_processes if found.processes else None,
        files=config.child_files,
        file_mib=config.child_file_mib,
        user=config.child_user,
        isolate=found.network,
    )
    return limits, found.problem


def log_limits(limits: ChildLimits, problem: str) -> None:
    """Log the limits that are enforced, as a warning if some are missing."""
    log = logger().warning if problem else logger().info
    log(
        "limits of environments",
        memory_mib=limits.memory_mib,
        files=limits.files,
        file_mib=limits.file_mib,
        processes=limits.processes or "not limited",
        network="none except for child_network, child_hosts and adapters with a url"
        if limits.isolate
        else "not limited",
        user="the gateway's" if limits.user is None else "one for each session",
        missing=problem or "nothing",
    )
