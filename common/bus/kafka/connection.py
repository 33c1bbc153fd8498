"""Connection to the brokers: addresses, encryption, credentials; and retries while they do not answer."""

import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kafka import errors

from palimpsest.common.bus.kafka.availability import AvailabilityMonitor
from palimpsest.common.bus.kafka.probe import BrokerRefused, BrokerUnreachable, probe_broker
from palimpsest.common.config.bus import BusConfig
from palimpsest.common.logs import logger
from palimpsest.common.outages import KAFKA, OUTAGES, Outages
from palimpsest.common.tls import tls_context
from palimpsest.common.user_error import ExitCode, UserError

T = TypeVar("T")
USERNAME, PASSWORD = "PALIMPSEST_KAFKA_USERNAME", "PALIMPSEST_KAFKA_PASSWORD"
"""Environment variables. With the suffix _FILE they name a file that holds the value."""
START_S = 60.0
"""Time for a broker to answer when a process starts, in seconds."""
PAUSE_S = 0.5
SAY_S = 10.0
"""Interval between two log lines about a log that does not answer, in seconds."""
PROTOCOLS = {"plaintext": "PLAINTEXT", "tls": "SSL", "sasl_plaintext": "SASL_PLAINTEXT", "sasl_tls": "SASL_SSL"}
DENIED = (
    errors.AuthorizationError,
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    BrokerRefused,
)
"""Errors for which a retry cannot succeed."""


@dataclass(frozen=True)
class Connection:
    """Settings shared by the clients of one Kafka."""

    servers: str
    options: Mapping[str, Any] = field(repr=False)
    """Keyword arguments for kafka-python's clients: protocol, certificates, credentials."""
    outage_limit_s: float = 600.0
    start_limit_s: float = START_S
    outages: Outages = field(default=OUTAGES, repr=False)
    prober: AvailabilityMonitor = field(init=False, repr=False)
    """Monitor to notify of every missing answer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prober", AvailabilityMonitor(self.servers, self.probe, self.outages))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a client: bootstrap servers, reconnects, credentials."""
        return {
            "bootstrap_servers": self.servers.split(","),
            "bootstrap_timeout_ms": 5_000,
            "reconnect_backoff_max_ms": 1_000,  # clients reconnect within a second after an outage
            "request_timeout_ms": 10_000,
            **self.options,
        }

    def client(self, make: Callable[..., T], *, limit_s: float | None = None, **arguments: Any) -> T:
        """Create a client with `make`.

        Raises UserError if no broker answers for `limit_s` seconds (default: start_limit_s), or if the brokers refuse
        the login.
        """
        settings = {**self.arguments(), **arguments}

        def create() -> T:
            self.probe()  # a kafka-python client that cannot connect leaves a thread behind
            return make(**settings)

        return self.retry_until_answered(
            create, doing="connect", limit_s=self.start_limit_s if limit_s is None else limit_s
        )

    def probe(self) -> None:
        """Log in to one of the brokers. Raises BrokerUnreachable, or BrokerRefused if a broker rejects the login."""
        problems = []
        for server in self.servers.split(","):
            try:
                return probe_broker(server, self.options)
            except BrokerUnreachable as problem:
                problems.append(str(problem))
        raise BrokerUnreachable("; ".join(problems))

    def retry_until_answered(self, call: Callable[[], T], *, doing: str, limit_s: float | None = None) -> T:
        """Retry the call until it succeeds.

        Raises UserError after `limit_s` seconds (default: outage_limit_s), or at once if the broker denies access.
        """
        limit_s = self.outage_limit_s if limit_s is None else limit_s
        began = logged_at = time.monotonic()
        with self.outages.waiting() as outage:
            until = self.outages.now() + limit_s
            while True:
                try:
                    return call()
                except DENIED as error:
                    raise self.access_error(error) from None
                except (errors.RetriableError, errors.BrokerNotAvailableError, OSError) as error:
                    problem: Exception = error
                outage.record_failure(KAFKA, self.servers, _describe_error(problem), until=until)
                now = time.monotonic()
                if now - began > limit_s:
                    raise self.outage_error(doing, now - began, self.reason(problem)) from None
                if now - logged_at > SAY_S:
                    logged_at = now
                    reason = self.reason(problem)
                    if self.outages.logged:
                        logger().warning("the log does not answer", servers=self.servers, doing=doing, problem=reason)
                time.sleep(PAUSE_S)

    def reason(self, problem: Exception) -> str:
        """Probe the brokers for the cause of a client's failure. Raises UserError if they refuse the login."""
        try:
            self.probe()
        except BrokerUnreachable as error:
            return str(error)
        except BrokerRefused as error:
            raise self.access_error(error) from None
        return _describe_error(problem)

    def outage_error(self, doing: str, seconds: float, problem: str) -> UserError:
        """Return the error for an outage that exceeds the limit."""
        return UserError(
            f"Kafka at {self.servers} (bus.servers): could not {doing} for {seconds:.0f} s: {problem}. Check that the "
            f"broker runs, that the address is right and that its listener uses bus.security ({self._protocol()}). "
            f"Then start again; a run resumes from its last checkpoint",
            ExitCode.UNAVAILABLE,
        )

    def access_error(self, error: Exception) -> UserError:
        """Return the error for a login or an operation that the broker refuses."""
        if isinstance(error, errors.AuthorizationError):
            remedy = "Give the user the permissions that docs/operations.md lists (ACLs on topics and groups)"
        else:
            remedy = (
                f"Check bus.security ({self._protocol()}), bus.sasl_mechanism ({self._mechanism()}), {USERNAME} and "
                f"{PASSWORD}"
            )
        return UserError(
            f"Kafka at {self.servers} (bus.servers) refuses access: {_describe_error(error)}. {remedy}",
            ExitCode.CONFIGURATION,
        )

    def _mechanism(self) -> str:
        return str(self.options.get("sasl_mechanism", "none"))

    def _protocol(self) -> str:
        return str(self.options.get("security_protocol", "PLAINTEXT"))


def connection(config: BusConfig, environment: Mapping[str, str] = os.environ) -> Connection:
    """Return the connection of a configuration. Raises UserError if credentials or certificates are missing."""
    options: dict[str, Any] = {"security_protocol": PROTOCOLS[config.security]}
    if config.security.startswith("sasl"):
        options |= {
            "sasl_mechanism": config.sasl_mechanism,
            "sasl_plain_username": _secret(USERNAME, environment, config),
            "sasl_plain_password": _secret(PASSWORD, environment, config),
        }
    if config.security.endswith("tls"):
        options["ssl_context"] = _context(config)
    return Connection(config.servers, options, config.outage_limit_s)


def _context(config: BusConfig) -> ssl.SSLContext:
    """Return the TLS context with trusted CA certificates and the client certificate."""
    context = tls_context(config.ca_file, key="bus.ca_file")
    if config.certificate_file is None:
        return context
    try:
        context.load_cert_chain(config.certificate_file, config.key_file)
    except OSError as problem:  # includes ssl.SSLError
        raise UserError(
            f"bus.certificate_file = {str(config.certificate_file)!r} and bus.key_file = {str(config.key_file)!r} are "
            f"not a certificate (PEM) with its private key: {problem.strerror or problem}"
        ) from None
    return context


def _describe_error(problem: Exception) -> str:
    """Return the error text. Errors of kafka-python and of the probe contain their type; others get it as a prefix."""
    named = isinstance(problem, errors.KafkaError | BrokerRefused | BrokerUnreachable)
    return f"{problem}" if named else f"{type(problem).__name__}: {problem}"


def _secret(name: str, environment: Mapping[str, str], config: BusConfig) -> str:
    file = environment.get(f"{name}_FILE")
    if name not in environment and file is None:
        raise UserError(
            f"bus.security is {config.security}: set the environment variable {name}, or {name}_FILE with the path of "
            f"a file that holds the value"
        )
    where = name if name in environment else f"{name}_FILE"
    try:
        found = environment[name] if name in environment else Path(environment[where]).read_text().strip()
    except OSError as error:
        raise UserError(f"{where} = {file}: cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(f"{where} is empty: set it to the Kafka user name or password")
    return found
