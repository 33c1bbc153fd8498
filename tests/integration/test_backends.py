"""The servers of tools/backends: persistence, TLS, commands, and that they touch no foreign process."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka as kafka_python
import msgspec
import pytest
from kafka.admin import NewTopic

from palimpsest.common.user_error import ExitCode, UserError
from tests.processes.waiting import LIMIT_S
from tests.servers.backends import kafka_client, s3_client
from tools.backends import ports
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio
from tools.backends.process_identity import Identity

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
TOPIC = "records"
IN_A_THREAD_THAT_ENDS = """
import sys, threading, time
from pathlib import Path
from tools.backends.minio import Minio

minio = Minio(Path(sys.argv[1]))
thread = threading.Thread(target=minio.start)
thread.start()
thread.join()
while Path(f"/proc/self/task/{thread.native_id}").exists():
    time.sleep(0.01)
print(minio.process.pid, minio.answers(), flush=True)
sys.stdin.read()
"""


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tools.backends", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Folder for the servers of `up`; the fixture stops the servers after the test."""
    yield tmp_path / "with blank"
    command("down", tmp_path / "with blank")


def processes(folder: Path) -> list[Identity]:
    """Processes that the process.json files of this folder name."""
    read = [Identity.read(folder / name / "process.json") for name in ("kafka", "minio")]
    return [process for process in read if process is not None]


def chosen_ports() -> list[str]:
    first = ports.free()
    return ["--kafka-port", str(first), "--minio-port", str(ports.free(first))]


def create_topic(settings: dict[str, object]) -> None:
    admin = kafka_python.KafkaAdminClient(**settings)
    admin.create_topics([NewTopic(TOPIC, num_partitions=1, replication_factor=1)])
    admin.close()


def append(settings: dict[str, object], values: list[bytes]) -> None:
    """Append records and wait for their acknowledgements."""
    producer = kafka_python.KafkaProducer(acks="all", **settings)
    for sent in [producer.send(TOPIC, value) for value in values]:
        sent.get(timeout=LIMIT_S)
    producer.close()


def records(settings: dict[str, object], count: int) -> list[bytes]:
    """First `count` records of the topic."""
    partition = kafka_python.TopicPartition(TOPIC, 0)
    consumer = kafka_python.KafkaConsumer(auto_offset_reset="none", enable_auto_commit=False, **settings)
    consumer.assign([partition])
    consumer.seek(partition, 0)
    found = [next(consumer).value for _ in range(count)]
    assert consumer.end_offsets([partition]) == {partition: count}
    consumer.close()
    return found


def test_up_starts_both_servers_prints_their_addresses_and_is_idempotent(folder: Path) -> None:
    chosen = chosen_ports()
    first = command("up", folder, *chosen)
    assert first.returncode == ExitCode.DONE, first.stderr
    exported = dict(re.findall(r"^  export (\w+)=(\S+)$", first.stdout, re.MULTILINE))
    assert exported["PALIMPSEST_BUS__SERVERS"] == f"127.0.0.1:{chosen[1]}"
    assert exported["PALIMPSEST_SNAPSHOT_STORE__ENDPOINT"] == f"http://127.0.0.1:{chosen[3]}"
    minio = Minio(folder / "minio")
    assert exported["AWS_ACCESS_KEY_ID"] == minio.access_key
    assert exported["AWS_SECRET_ACCESS_KEY"] == minio.secret_key

    sourced = subprocess.run(
        ["sh", "-c", '. "$1/environment" && env', "sh", folder], capture_output=True, text=True, check=True
    )
    assert {f"{name}={value}" for name, value in exported.items()} <= set(sourced.stdout.splitlines())

    running = processes(folder)
    assert [process.alive for process in running] == [True, True]
    second = command("up", folder)
    assert second.returncode == ExitCode.DONE
    assert second.stdout.count("runs already") == 2
    assert processes(folder) == running
    assert command("status", folder).returncode == ExitCode.DONE
    moved = command("up", folder, "--kafka-port", str(ports.free()))
    assert (moved.returncode, "runs already, on port" in moved.stderr) == (ExitCode.CONFIGURATION, True)

    s3_client(minio).make_bucket("kept")
    assert command("down", folder).returncode == ExitCode.DONE
    assert [process.alive for process in running] == [False, False]
    assert processes(folder) == []
    assert command("status", folder).returncode == ExitCode.UNAVAILABLE
    assert "did not run" in command("down", folder).stdout

    assert command("up", folder).returncode == ExitCode.DONE
    assert s3_client(minio).bucket_exists("kept")  # same port and credentials as before


def test_down_does_not_kill_a_foreign_process_with_a_recycled_pid(folder: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as foreign, contextlib.ExitStack() as at_last:
        at_last.callback(foreign.kill)
        identity = Identity.of(foreign.pid)
        assert identity is not None
        for name, stale in (
            ("kafka", msgspec.structs.replace(identity, started=identity.started - 1)),
            ("minio", msgspec.structs.replace(identity, boot="an earlier one")),
        ):
            (folder / name).mkdir(parents=True)
            stale.write(folder / name / "process.json")
        done = command("down", folder)
        assert (done.returncode, done.stdout.count("did not run")) == (ExitCode.DONE, 2)
        assert foreign.poll() is None
        assert processes(folder) == []


def test_up_refuses_a_port_in_use_and_leaves_no_process(folder: Path) -> None:
    with socket.create_server((ports.HOST, port := ports.free())):
        refused = command("up", folder, "--kafka-port", str(port))
    assert refused.returncode == ExitCode.UNAVAILABLE
    assert f"port {port} of 127.0.0.1 is in use" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert processes(folder) == []


def test_ctrl_c_while_kafka_starts_leaves_no_process(folder: Path) -> None:
    words = [sys.executable, "-m", "tools.backends", "up", str(folder), *chosen_ports()]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    ) as up:  # fmt: skip
        until(lambda: processes(folder) != [])
        (kafka,) = processes(folder)
        up.send_signal(signal.SIGINT)
        _, errors = up.communicate(timeout=LIMIT_S)
    assert up.returncode == ExitCode.INTERRUPTED
    assert ("Traceback" in errors, "interrupted" in errors) == (False, True)
    assert not kafka.alive
    assert processes(folder) == []


def test_a_server_outlives_the_thread_that_started_it_but_not_the_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_THREAD_THAT_ENDS, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as starter:  # fmt: skip
        assert starter.stdout is not None
        pid, answers = starter.stdout.readline().split()
        server = Identity.of(int(pid))
        assert server is not None
        assert answers == "True"
        starter.kill()
    until(lambda: not server.alive)


def test_kafka_survives_a_pause_and_keeps_acknowledged_records_after_a_kill(tmp_path: Path) -> None:
    with Kafka(tmp_path) as kafka:
        answers_again_after_a_pause(kafka)
        settings = kafka_client(kafka)
        create_topic(settings)
        values = [os.urandom(1000) for _ in range(300)]
        append(settings, values[:200])
        kafka.kill()
        assert (kafka.running, kafka.answers()) == (False, False)
        kafka.start()
        append(settings, values[200:])
        assert records(settings, 300) == values
    assert not kafka.running


def test_minio_survives_a_pause_and_keeps_objects_after_a_kill(tmp_path: Path) -> None:
    body = os.urandom(3 << 20)
    with Minio(tmp_path) as minio:
        answers_again_after_a_pause(minio)
        client = s3_client(minio)
        client.make_bucket("kept")
        client.put_object("kept", "object", io.BytesIO(body), len(body))
        minio.kill()
        assert (minio.running, minio.answers()) == (False, False)
        minio.start()
        assert s3_client(minio).get_object("kept", "object").read() == body
    assert not minio.running


def answers_again_after_a_pause(server: Kafka | Minio) -> None:
    server.pause()
    assert (server.running, server.answers()) == (True, False)
    server.resume()
    until(server.answers)


def test_the_error_of_a_server_that_cannot_start_contains_the_end_of_its_log(tmp_path: Path) -> None:
    kafka = Kafka(tmp_path / "kafka")
    (kafka.folder / "data").mkdir()  # an empty folder is invalid
    with pytest.raises(UserError, match=r"(?s)Kafka ended with 1 .*kafka\.log.*meta\.properties") as error:
        kafka.start()
    assert error.value.code == ExitCode.UNAVAILABLE
    assert not kafka.running


def test_clients_verify_the_certificate_of_minio(tmp_path: Path) -> None:
    with Minio(tmp_path, tls=True) as minio:
        client = s3_client(minio)
        client.make_bucket("kept")
        assert [bucket.name for bucket in client.list_buckets()] == ["kept"]
        answer = subprocess.run(
            [sys.executable, "-c", f"import httpx; httpx.get('{minio.endpoint}/minio/health/live')"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "CERTIFICATE_VERIFY_FAILED" in answer.stderr
