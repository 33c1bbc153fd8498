"""Probe whether a broker accepts this client, and find the reason if it does not, over one connection.

kafka-python's public clients retry for every reason and report only a timeout. They lose an answer that arrives
together with the end of the connection, such as a rejected login. Therefore this module implements the exchange itself.
It uses these internals of kafka-python, which requirements/ pins; `kafka.__all__` exports no codec and no login:

- `kafka.protocol.parser.KafkaProtocol`: encodes requests, decodes responses
- `kafka.protocol.metadata.ApiVersionsRequest`, `kafka.protocol.sasl.SaslHandshakeRequest`, `SaslAuthenticateRequest`
- `kafka.net.sasl.get_sasl_mechanism`: the exchange of PLAIN and SCRAM
- `kafka.cluster.collect_hosts`: splits `host:port`, brackets of IPv6 included
"""

import contextlib
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from kafka import errors
from kafka.cluster import collect_hosts
from kafka.net.sasl import get_sasl_mechanism
from kafka.protocol.metadata import ApiVersionsRequest
from kafka.protocol.parser import KafkaProtocol
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest

ANSWER_S = 5.0
NO_LOGIN_HERE = 34
"""Error code of a SASL handshake on a listener without SASL (ILLEGAL_SASL_STATE)."""
UNKNOWN_MECHANISM = 33


class BrokerUnreachable(ConnectionError):
    """Raised if no broker answers. A retry may succeed."""


class BrokerRefused(Exception):
    """Raised if a broker refuses this client. A retry cannot succeed."""


def probe_broker(server: str, options: Mapping[str, Any]) -> None:
    """Log in to this broker (`host:port`) with options of kafka-python. Raises BrokerUnreachable or BrokerRefused."""
    try:
        with contextlib.closing(_connect(server)) as plain:
            if options.get("ssl_context") is None:
                _authenticate(plain, server, options)
            else:
                with contextlib.closing(_start_tls(plain, server, options["ssl_context"])) as line:
                    _authenticate(line, server, options)
    except BrokerUnreachable:
        raise
    except _Disconnected as problem:
        raise _disconnect_error(server, options, problem) from None
    except (OSError, errors.KafkaError) as problem:
        raise BrokerUnreachable(f"{server}: {_text(problem)}") from None


class _Disconnected(Exception):
    """Raised if the broker closes the connection instead of answering."""


class _Channel:
    """Requests and responses on one connection, one at a time."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._protocol = line, KafkaProtocol(client_id="palimpsest")

    def request(self, request: Any) -> Any:
        try:
            self._protocol.send_request(request)
            self._line.sendall(self._protocol.send_bytes())
            while received := self._line.recv(65536):
                for _, answer in self._protocol.receive_bytes(received):
                    return answer
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, errors.KafkaProtocolError) as problem:
            raise _Disconnected(_text(problem)) from None
        except ssl.SSLError as problem:  # the broker rejects a missing or untrusted client certificate here
            raise BrokerRefused(
                f"it does not accept the client certificate ({_text(problem)}): check bus.certificate_file and "
                f"bus.key_file"
            ) from None
        raise _Disconnected("the broker closed the connection")


def _connect(server: str) -> socket.socket:
    host, port, _ = collect_hosts(server)[0]
    try:
        return socket.create_connection((host, port), timeout=ANSWER_S)
    except socket.gaierror as problem:
        raise BrokerUnreachable(f"{server}: unknown host ({problem.strerror})") from None


def _start_tls(plain: socket.socket, server: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    try:
        return context.wrap_socket(plain, server_hostname=collect_hosts(server)[0][0])
    except ssl.SSLCertVerificationError as problem:
        raise BrokerRefused(
            f"its certificate is not trusted ({problem.verify_message}): bus.ca_file must hold the CA that signed it, "
            f"and bus.servers must use a host name of the certificate"
        ) from None
    except (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError) as problem:
        raise _Disconnected(_text(problem)) from None
    except ssl.SSLError as problem:
        raise BrokerRefused(
            f"the TLS handshake failed ({_text(problem)}): check bus.security, bus.certificate_file and bus.key_file"
        ) from None


def _authenticate(line: socket.socket, server: str, options: Mapping[str, Any]) -> None:
    channel = _Channel(line)
    channel.request(ApiVersionsRequest(version=0))
    mechanism = options.get("sasl_mechanism")
    handshake = SaslHandshakeRequest(version=1, mechanism=mechanism or "PLAIN")
    if mechanism is None:
        with contextlib.suppress(_Disconnected):  # some brokers close the connection on a listener without SASL
            if channel.request(handshake).error_code in {0, UNKNOWN_MECHANISM}:
                raise BrokerRefused(
                    "it requires a login: bus.security must be sasl_plaintext or sasl_tls, with bus.sasl_mechanism"
                )
        return
    answer = channel.request(handshake)
    if answer.error_code == NO_LOGIN_HERE:
        raise BrokerRefused("its listener has no SASL login: bus.security must be plaintext or tls")
    if answer.error_code == UNKNOWN_MECHANISM:
        raise BrokerRefused(
            f"it does not support {mechanism}, only {', '.join(sorted(answer.mechanisms))}: set bus.sasl_mechanism"
        )
    _log_in(channel, server, options)


def _log_in(channel: _Channel, server: str, options: Mapping[str, Any]) -> None:
    login = get_sasl_mechanism(options["sasl_mechanism"])(host=collect_hosts(server)[0][0], **options)
    while not login.is_done():
        answer = channel.request(SaslAuthenticateRequest(version=1, auth_bytes=login.auth_bytes()))
        if answer.error_code:
            raise BrokerRefused(
                f"the login of {options['sasl_plain_username']!r} failed: {answer.error_message or 'no reason given'}"
            )
        try:
            login.receive(answer.auth_bytes)
        except ValueError as problem:
            raise BrokerRefused(f"it did not prove that it has the password: {problem}") from None


def _disconnect_error(server: str, options: Mapping[str, Any], problem: _Disconnected) -> Exception:
    """Return the error for a broker that closes the connection: it may be stopping, or use another protocol."""
    if options.get("ssl_context") is None:
        if _speaks_tls(server):
            return BrokerRefused("its listener uses TLS: bus.security must be tls or sasl_tls, with bus.ca_file")
    elif _speaks_plaintext(server):
        return BrokerRefused("its listener does not use TLS: bus.security must be plaintext or sasl_plaintext")
    return BrokerUnreachable(f"{server}: {problem}")


def _speaks_tls(server: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no data is sent over this connection
    try:
        with contextlib.closing(_connect(server)) as plain:
            context.wrap_socket(plain).close()
    except OSError as problem:
        return isinstance(problem, ssl.SSLError) and "ALERT" in (problem.reason or "")
    return True


def _speaks_plaintext(server: str) -> bool:
    try:
        with contextlib.closing(_connect(server)) as plain:
            _Channel(plain).request(ApiVersionsRequest(version=0))
    except (OSError, _Disconnected):
        return False
    return True


def _text(problem: BaseException) -> str:
    if isinstance(problem, TimeoutError):
        return f"no answer in {ANSWER_S:.0f} s"
    return f"{getattr(problem, 'strerror', None) or problem}" or type(problem).__name__
