"""The `env_gateway` section. docs/configuration.md is generated from the docstrings under the keys."""

from typing import Annotated

from pydantic import Field, model_validator

from palimpsest.common.config.section import Positive, PositiveFloat, Service

SESSION_LEASE_S = 600.0
"""Lease of a session if `env_gateway.lease_s` is None, in seconds; less if `tasks.time_limit_s` is less."""


class EnvGatewayConfig(Service):
    """The gateway to the environments."""

    url: str = ""
    """URL at which rollout workers reach the gateway. Default: http://host:port."""
    lease_s: PositiveFloat | None = None
    """Lease of a session, in seconds. A session without a request for this time expires. A worker renews the leases of
    its sessions, so the lease need not cover a long model message. At most tasks.time_limit_s. None: 600, or
    tasks.time_limit_s if that is less."""
    step_limit_s: PositiveFloat = 60.0
    """Time limit of a step, in seconds. A longer step ends the session with status `error`. At most
    tasks.time_limit_s."""
    max_sessions: Positive = 4096
    """Maximum number of sessions. The gateway refuses more with 429."""
    remember_s: PositiveFloat = 600.0
    """Time for which the gateway keeps an ended session, in seconds. A late retry gets the stored reply. At least
    env_gateway.step_limit_s, because a client may wait for that long before it retries."""
    request_limit_bytes: Positive = 1048576
    """Maximum size of a request. The gateway refuses larger requests with 413."""
    result_limit_bytes: Positive = 65536
    """Maximum size of a tool result. Longer results are truncated, with a note in the text."""
    plugins: dict[str, str] = {}
    """Additional environments: name -> `package.module:Class`. Each of their sessions runs in a separate process."""
    plugin_variables: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of environment variables that the processes of plugins receive, for example `["TAU2_DATA_DIR"]`. Without
    this key they receive only the usual ones, such as PATH, HOME and the locale (docs/gateway.md)."""
    max_processes: Positive = 64
    """Maximum number of concurrent sessions in separate processes. Further sessions wait."""

    @model_validator(mode="after")
    def _replies_outlast_steps(self) -> "EnvGatewayConfig":
        if self.remember_s < self.step_limit_s:
            raise ValueError(
                f"env_gateway.remember_s ({self.remember_s}) is less than env_gateway.step_limit_s "
                f"({self.step_limit_s}): a retry could come after the reply is forgotten"
            )
        return self
