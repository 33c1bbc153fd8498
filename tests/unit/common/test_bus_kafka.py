"""Parts of the Kafka log that need no broker: credentials, checks of topics, and servers that are no broker."""

import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from kafka import errors
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from palimpsest.common.bus.kafka import Connection, Settings, batches, connection
from palimpsest.common.bus.kafka.connection import PASSWORD, USERNAME
from palimpsest.common.bus.kafka.probe import BrokerRefused, BrokerUnreachable, probe_broker
from palimpsest.common.bus.kafka.topics import _problems, _suffices
from palimpsest.common.bus.port import UNREADABLE
from palimpsest.common.config.bus import BusConfig
from palimpsest.common.user_error import ExitCode, UserError
from tools.backends.certificates import make

SASL = BusConfig(kind="kafka", servers="a:1", security="sasl_plaintext", sasl_mechanism="PLAIN")
Answer = Callable[[socket.socket], None]


def test_credentials_come_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    found = connection(SASL, {USERNAME: "me", f"{PASSWORD}_FILE": str(tmp_path / "password")}).options
    assert found == {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": "me",
        "sasl_plain_password": "secret",
    }


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, f"bus.security is sasl_plaintext: set the environment variable {USERNAME}, or {USERNAME}_FILE"),
        ({USERNAME: "me"}, f"set the environment variable {PASSWORD}, or {PASSWORD}_FILE"),
        ({USERNAME: "me", f"{PASSWORD}_FILE": "/nowhere"}, f"{PASSWORD}_FILE = /nowhere: cannot be read"),
        ({USERNAME: "", PASSWORD: "x"}, f"{USERNAME} is empty"),
        ({USERNAME: "me", f"{PASSWORD}_FILE": "/dev/null"}, f"{PASSWORD}_FILE is empty"),
    ],
)
def test_missing_credentials_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        connection(SASL, environment)
    assert error.value.code is ExitCode.CONFIGURATION


def test_a_password_is_not_shown() -> None:
    assert "secret-word" not in repr(connection(SASL, {USERNAME: "me", PASSWORD: "secret-word"}))


def test_a_certificate_without_its_key_is_refused_by_both_names(tmp_path: Path) -> None:
    make(tmp_path)
    ca, ours = tmp_path / "ca.pem", tmp_path / "client.pem"
    whole = BusConfig(security="tls", ca_file=ca, certificate_file=ours, key_file=tmp_path / "client.key")
    assert isinstance(connection(whole, {}).options["ssl_context"], ssl.SSLContext)
    for key in (tmp_path / "server.key", ca, None):
        with pytest.raises(UserError, match=rf"bus.certificate_file = '{ours}' and bus.key_file = '?{key}'? are no"):
            connection(BusConfig(security="tls", ca_file=ca, certificate_file=ours, key_file=key), {})


TOPIC = {"partitions": [{"replica_nodes": [1, 2]}, {"replica_nodes": [2]}]}


def test_every_problem_of_a_topic_is_named_with_one_command_that_fixes_its_settings() -> None:
    standing = Settings(retention_ms=1000).options() | {"max.message.bytes": "10"}
    replicas = (
        "has 1 replicas; bus.replicas is 2: add replicas with kafka-reassign-partitions.sh, or set bus.replicas to 1"
    )
    command = "kafka-configs.sh --bootstrap-server a:1 --alter --entity-type topics --entity-name t --add-config "
    assert _problems("a:1", Settings(replicas=2, retention_ms=2000), "t", 3, TOPIC, standing) == [
        "topic t on a:1 has 2 partitions; the run needs 3",
        f"topic t on a:1 {replicas}",
        "topic t on a:1 has retention.ms = 1000; the run needs 2000",
        "topic t on a:1 has max.message.bytes = 10; the run needs 1048576",
        f"  to change it: {command}retention.ms=2000,max.message.bytes=1048576",
    ]


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_more_suffices_and_less_does_not(has: int, wanted: int) -> None:
    for option in ("retention.ms", "max.message.bytes", "min.insync.replicas"):
        assert _suffices(option, str(has), str(wanted)) == (has >= wanted)
    assert _suffices("retention.ms", "-1", str(wanted))
    assert not _suffices("retention.bytes", str(has), "-1")


@given(st.text(max_size=8).filter(lambda text: text != "delete"))
def test_another_policy_or_an_invalid_number_does_not_suffice(has: str) -> None:
    assert not _suffices("cleanup.policy", has, "delete")
    assert not _suffices("max.message.bytes", f"{has}x", "1")


@pytest.fixture
def answering() -> Iterator[Callable[[Answer], str]]:
    """Open ports whose connections are served by the given function; returns their addresses."""
    listeners: list[socket.socket] = []

    def serve(listener: socket.socket, answer: Answer) -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            with closing(line):
                answer(line)

    def begin(answer: Answer) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=serve, args=(listener, answer), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield begin
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def hang_up(line: socket.socket) -> None:
    """Close the connection, as a proxy does before its broker is up."""


def garbage(line: socket.socket) -> None:
    line.recv(1024)
    line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("answer", [hang_up, garbage])
@pytest.mark.parametrize("options", [{}, {"ssl_context": ssl.create_default_context()}])
def test_a_closed_connection_is_retried_and_a_server_without_tls_is_not(
    answering: Callable[[Answer], str], answer: Answer, options: dict[str, Any]
) -> None:
    server = answering(answer)
    with pytest.raises(
        BrokerRefused if answer is garbage and options else BrokerUnreachable, match=None if options else server
    ):
        probe_broker(server, options)


class Clock:
    """Stand-in for the module `time`: sleep returns at once and advances the clock."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_waiting_ends_at_its_limit_with_the_reason_and_at_once_if_access_is_denied(
    answering: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = answering(hang_up)
    clock = Clock()
    monkeypatch.setattr(sys.modules[Connection.__module__], "time", clock)
    calls: list[float] = []

    def failing(problem: Exception) -> None:
        calls.append(clock.now)
        raise problem

    unreachable = Connection(server, {}, outage_limit_s=0.6)
    with pytest.raises(UserError, match=rf"Kafka at {server} \(bus.servers\): could not read for 1 s: {server}"):
        unreachable.retry_until_answered(lambda: failing(errors.NodeNotReadyError()), doing="read")
    assert calls == [0.0, 0.5, 1.0]
    for final in (errors.TopicAuthorizationFailedError("t"), BrokerRefused("it requires a login")):
        calls.clear()
        with pytest.raises(UserError, match="refuses access"):
            unreachable.retry_until_answered(lambda: failing(final), doing="read")  # noqa: B023
        assert len(calls) == 1


UNREACHABLE = """
import logging
from palimpsest.common import logs
from palimpsest.common.bus.kafka import Connection, KafkaBus

logging.basicConfig()  # as libraries do that a service loads
logs.configure("rollout", "info", "text")
logging.getLogger("kafka.net.manager").error("one of very many")
Connection.probe = lambda self: None  # so that kafka-python itself looks for brokers
KafkaBus(Connection("127.0.0.1:1", {"bootstrap_timeout_ms": 300}, start_limit_s=0.0), prefix="t.")
"""


def test_outage_messages_of_kafka_python_stay_out_of_a_services_log() -> None:
    ended = subprocess.run([sys.executable, "-c", UNREACHABLE], capture_output=True, text=True, check=False)
    *_, error = ended.stderr.splitlines()
    assert error.startswith(
        "palimpsest.common.user_error.UserError: Kafka at 127.0.0.1:1 (bus.servers): could not connect"
    )
    assert not [line for line in ended.stderr.splitlines() if line.startswith(("ERROR:", "WARNING:"))]


def test_other_errors_while_waiting_are_passed_on() -> None:
    def failing() -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        Connection("127.0.0.1:1", {}).retry_until_answered(failing, doing="read")


def batch(codec: int, *bodies: bytes, header: tuple[str, bytes] = ("h", b"")) -> DefaultRecordBatchBuilder:
    builder = DefaultRecordBatchBuilder(2, codec, False, -1, -1, -1, 1 << 30)
    for offset, body in enumerate(bodies):
        builder.append(offset, 0, b"k", body, [header])
    return builder


def read_batch(data: bytes) -> list[Any]:
    """The records of a batch, as the class reads them that `install` puts in place."""
    return list(batches.BoundedBatch(data))


@pytest.mark.parametrize("codec", [0, 1, 4])
def test_a_batch_is_read_with_every_codec_that_is_installed(codec: int) -> None:
    data = batch(codec, b"a" * 1000, b"b").build()
    assert [(record.offset, record.key, record.value) for record in read_batch(data)] == [
        (0, b"k", b"a" * 1000), (1, b"k", b"b"),
    ]  # fmt: skip


@pytest.mark.parametrize("codec", [1, 4])
def test_a_batch_that_expands_beyond_the_limit_becomes_one_record_with_the_reason(codec: int) -> None:
    """64 MiB of zeros, in 64 KiB (gzip) or 6 KiB (zstd)."""
    data = batch(codec, bytes(batches.MOST_BATCH_BYTES), b"b").build()
    assert len(data) < 100_000
    (record,) = read_batch(data)
    assert (record.offset, record.value) == (0, b"")
    ((name, reason),) = record.headers
    assert name == UNREADABLE
    assert b"offsets 0 to 1 cannot be read: TooLong: it has more than 67108864 bytes" in reason


def test_a_batch_that_cannot_be_decoded_becomes_one_record_with_the_reason() -> None:
    """A header name that is not UTF-8; a codec that is not installed; a truncated stream; too many records."""
    named = bytes(batch(0, b"a", header=("hh", b"")).build()).replace(b"hh", b"\xff\xfe")
    other = bytearray(batch(0, b"a").build())
    other[DefaultRecordBatch.ATTRIBUTES_OFFSET + 1] |= 2
    cut = bytearray(batch(0, b"a").build())
    cut[DefaultRecordBatch.ATTRIBUTES_OFFSET + 1] |= 1
    many = bytearray(batch(0, b"a").build())
    many[57:61] = (1 << 20).to_bytes(4, "big")
    for data, reason in (
        (named, "UnicodeDecodeError|CorruptRecordError"),
        (other, "snappy"),
        (cut, "header"),
        (many, "1048576"),
    ):
        (record,) = read_batch(bytes(data))
        assert re.search(reason, record.headers[0][1].decode()), record.headers


def test_a_compression_that_no_reader_has_is_refused_with_the_command_that_changes_it() -> None:
    for value in ("lz4", "snappy"):
        *_, problem, command = _problems(
            "a:1", Settings(), "t", 2, TOPIC, Settings().options() | {"compression.type": value}
        )
        assert problem == f"topic t on a:1 has compression.type = {value}; the run needs producer"
        assert command.endswith("--entity-name t --add-config compression.type=producer")
    for value in ("producer", "uncompressed", "gzip", "zstd"):
        assert _problems("a:1", Settings(), "t", 2, TOPIC, Settings().options() | {"compression.type": value}) == []
