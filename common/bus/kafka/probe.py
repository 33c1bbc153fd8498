"""Whether a broker accepts this client, and if not, why: one connection, step by step.

kafka-python's public clients retry whatever the reason and report only a timeout: an answer of the broker that arrives
together with the end of the connection, such as a rejected login, is lost. So this module speaks the protocol itself.
It uses these internals of kafka-python, pinned in requirements/; `kafka.__all__` exports no codec and no login:

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
"""What a broker answers to a question about logins on a listener without any."""
UNKNOWN_MECHANISM = 33


class BrokerUnreachable(ConnectionError):
    """No broker that lets us in, so far."""


class BrokerRefused(Exception):
    """A broker is there and does not let us in, however often we ask."""


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
    """The broker ended the connection instead of answering."""


class _Channel:
    """Questions and answers, one at a time."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._protocol = line, KafkaProtocol(client_id="palimpsest")

    def request(self, question: Any) -> Any:
        try:
            self._protocol.send_request(question)
            self._line.sendall(self._protocol.send_bytes())
            while received := self._line.recv(65536):
                for _, answer in self._protocol.receive_bytes(received):
                    return answer
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, errors.KafkaProtocolError) as problem:
            raise _Disconnected(_text(problem)) from None
        except ssl.SSLError as problem:  # the first answer to a certificate that is not wanted, or missing
            raise BrokerRefused(
                f"it does not accept our certificate ({_text(problem)}): check bus.certificate_file and bus.key_file"
            ) from None
        raise _Disconnected("it ended the connection")


def _connect(server: str) -> socket.socket:
    host, port, _ = collect_hosts(server)[0]
    try:
        return socket.create_connection((host, port), timeout=ANSWER_S)
    except socket.gaierror as problem:
        raise BrokerUnreachable(f"{server}: no such host is known ({problem.strerror})") from None


def _start_tls(plain: socket.socket, server: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    try:
        return context.wrap_socket(plain, server_hostname=collect_hosts(server)[0][0])
    except ssl.SSLCertVerificationError as problem:
        raise BrokerRefused(
            f"its certificate is not to be trusted ({problem.verify_message}): bus.ca_file must hold the authority "
            f"that signed it, and bus.servers a name that is in it"
        ) from None
    except (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError) as problem:
        raise _Disconnected(_text(problem)) from None
    except ssl.SSLError as problem:
        raise BrokerRefused(
            f"no TLS comes about ({_text(problem)}): check bus.security, bus.certificate_file and bus.key_file"
        ) from None


def _authenticate(line: socket.socket, server: str, options: Mapping[str, Any]) -> None:
    asked = _Channel(line)
    asked.request(ApiVersionsRequest(version=0))
    mechanism = options.get("sasl_mechanism")
    handshake = SaslHandshakeRequest(version=1, mechanism=mechanism or "PLAIN")
    if mechanism is None:
        with contextlib.suppress(_Disconnected):  # not every broker answers this one where nobody logs in
            if asked.request(handshake).error_code in {0, UNKNOWN_MECHANISM}:
                raise BrokerRefused(
                    "it wants a login: bus.security must be sasl_plaintext or sasl_tls, with bus.sasl_mechanism"
                )
        return
    answer = asked.request(handshake)
    if answer.error_code == NO_LOGIN_HERE:
        raise BrokerRefused("it knows no logins there: bus.security must be plaintext or tls")
    if answer.error_code == UNKNOWN_MECHANISM:
        raise BrokerRefused(
            f"it knows no login by {mechanism}, only by {', '.join(sorted(answer.mechanisms))}: set bus.sasl_mechanism"
        )
    _log_in(asked, server, options)


def _log_in(asked: _Channel, server: str, options: Mapping[str, Any]) -> None:
    login = get_sasl_mechanism(options["sasl_mechanism"])(host=collect_hosts(server)[0][0], **options)
    while not login.is_done():
        answer = asked.request(SaslAuthenticateRequest(version=1, auth_bytes=login.auth_bytes()))
        if answer.error_code:
            raise BrokerRefused(
                f"the login of {options['sasl_plain_username']!r} failed: {answer.error_message or 'no reason given'}"
            )
        try:
            login.receive(answer.auth_bytes)
        except ValueError as problem:
            raise BrokerRefused(f"it does not prove that it knows our password: {problem}") from None


def _disconnect_error(server: str, options: Mapping[str, Any], problem: _Disconnected) -> Exception:
    """What to make of a broker that hangs up: it may be ending, or spoken to in the wrong way."""
    if options.get("ssl_context") is None:
        if _speaks_tls(server):
            return BrokerRefused("it speaks TLS there: bus.security must be tls or sasl_tls, with bus.ca_file")
    elif _speaks_plaintext(server):
        return BrokerRefused("it speaks without TLS there: bus.security must be plaintext or sasl_plaintext")
    return BrokerUnreachable(f"{server}: {problem}")


def _speaks_tls(server: str) -> bool:
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE  # nothing is said on this line
    try:
        with contextlib.closing(_connect(server)) as plain:
            anyone.wrap_socket(plain).close()
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
