"""How brokers are reached: addresses, encryption, identity; and what to do while they are silent."""

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
"""Environment variables; with _FILE behind the name, a file that holds the value."""
START_S = 60.0
"""A broker that has not answered for so long when a process starts is not there."""
PAUSE_S = 0.5
SAY_S = 10.0
"""Between two lines that say that the log does not answer."""
PROTOCOLS = {"plaintext": "PLAINTEXT", "tls": "SSL", "sasl_plaintext": "SASL_PLAINTEXT", "sasl_tls": "SASL_SSL"}
DENIED = (
    errors.AuthorizationError,
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    BrokerRefused,
)
"""No waiting mends these."""


@dataclass(frozen=True)
class Connection:
    """What every client of one Kafka needs."""

    servers: str
    options: Mapping[str, Any] = field(repr=False)
    """Keyword arguments of kafka-python's clients: protocol, certificates, credentials."""
    outage_limit_s: float = 600.0
    start_limit_s: float = START_S
    outages: Outages = field(default=OUTAGES, repr=False)
    prober: AvailabilityMonitor = field(init=False, repr=False)
    """To be told of every silence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prober", AvailabilityMonitor(self.servers, self.probe, self.outages))

    def arguments(self) -> dict[str, Any]:
        """For a client: bootstrap, retries of connections, identity."""
        return {
            "bootstrap_servers": self.servers.split(","),
            "bootstrap_timeout_ms": 5_000,
            "reconnect_backoff_max_ms": 1_000,  # an outage is over for us a second after it is over
            "request_timeout_ms": 10_000,
            **self.options,
        }

    def client(self, make: Callable[..., T], *, limit_s: float | None = None, **arguments: Any) -> T:
        """A client of this kind. Raises UserError when no broker answers for `limit_s` (default: the time a process has
        to start), or none lets us in."""
        settings = {**self.arguments(), **arguments}

        def create() -> T:
            self.probe()  # a client that finds nobody leaves a thread behind
            return make(**settings)

        return self.retry_until_answered(
            create, doing="connect", limit_s=self.start_limit_s if limit_s is None else limit_s
        )

    def probe(self) -> None:
        """Log in to one of the brokers. Raises BrokerUnreachable, or BrokerRefused when a broker rejects the login."""
        problems = []
        for server in self.servers.split(","):
            try:
                return probe_broker(server, self.options)
            except BrokerUnreachable as problem:
                problems.append(str(problem))
        raise BrokerUnreachable("; ".join(problems))

    def retry_until_answered(self, call: Callable[[], T], *, doing: str, limit_s: float | None = None) -> T:
        """Call until it succeeds. Raises UserError after `limit_s` (default: the run's limit of outages), or at once
        when the broker does not let us."""
        limit_s = self.outage_limit_s if limit_s is None else limit_s
        began = said = time.monotonic()
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
                if now - said > SAY_S:
                    said = now
                    reason = self.reason(problem)
                    if self.outages.logged:
                        logger().warning("the log does not answer", servers=self.servers, doing=doing, problem=reason)
                time.sleep(PAUSE_S)

    def reason(self, problem: Exception) -> str:
        """What lies behind a client's failure, asked at the brokers. Raises UserError when they do not let us in."""
        try:
            self.probe()
        except BrokerUnreachable as found:
            return str(found)
        except BrokerRefused as found:
            raise self.access_error(found) from None
        return _describe_error(problem)

    def outage_error(self, doing: str, seconds: float, problem: str) -> UserError:
        """What to say when an outage has lasted too long."""
        return UserError(
            f"Kafka at {self.servers} (bus.servers) did not let us {doing} for {seconds:.0f} s: {problem}. Is the "
            f"broker up, the address right, and bus.security ({self._protocol()}) what its listener wants? Start it "
            f"and start again; a run goes on from its last checkpoint",
            ExitCode.UNAVAILABLE,
        )

    def access_error(self, error: Exception) -> UserError:
        """What to say when the broker refuses us."""
        if isinstance(error, errors.AuthorizationError):
            remedy = "Give the user the rights that docs/operations.md lists (ACLs on topics and groups)"
        else:
            remedy = (
                f"Check bus.security ({self._protocol()}), bus.sasl_mechanism ({self._mechanism()}), {USERNAME} and "
                f"{PASSWORD}"
            )
        return UserError(
            f"Kafka at {self.servers} (bus.servers) refuses us: {_describe_error(error)}. {remedy}",
            ExitCode.CONFIGURATION,
        )

    def _mechanism(self) -> str:
        return str(self.options.get("sasl_mechanism", "none"))

    def _protocol(self) -> str:
        return str(self.options.get("security_protocol", "PLAINTEXT"))


def connection(config: BusConfig, environment: Mapping[str, str] = os.environ) -> Connection:
    """The connection that a run's configuration describes. Raises UserError for what is missing."""
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
    """Whom we trust, and the certificate that we show."""
    context = tls_context(config.ca_file, key="bus.ca_file")
    if config.certificate_file is None:
        return context
    try:
        context.load_cert_chain(config.certificate_file, config.key_file)
    except OSError as problem:  # ssl.SSLError is one, too
        raise UserError(
            f"bus.certificate_file = {str(config.certificate_file)!r} and bus.key_file = {str(config.key_file)!r} are "
            f"no certificate (PEM) with its private key: {problem.strerror or problem}"
        ) from None
    return context


def _describe_error(problem: Exception) -> str:
    """Errors of kafka-python and of the probe already name their kind; others get the type's name."""
    named = isinstance(problem, errors.KafkaError | BrokerRefused | BrokerUnreachable)
    return f"{problem}" if named else f"{type(problem).__name__}: {problem}"


def _secret(name: str, environment: Mapping[str, str], config: BusConfig) -> str:
    file = environment.get(f"{name}_FILE")
    if name not in environment and file is None:
        raise UserError(
            f"bus.security is {config.security}, so the environment must hold {name}, or {name}_FILE with the path of "
            f"a file that does"
        )
    where = name if name in environment else f"{name}_FILE"
    try:
        found = environment[name] if name in environment else Path(environment[where]).read_text().strip()
    except OSError as error:
        raise UserError(f"{where} = {file}: cannot be read ({error.strerror})") from None
    if not found:
        raise UserError(f"{where} is empty: it must hold what the brokers know us by")
    return found
