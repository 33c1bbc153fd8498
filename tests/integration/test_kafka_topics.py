"""Topics on a real Kafka: settings, retention, and long records in the store."""

import asyncio
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from palimpsest.common.bus.claim_check import CLAIM, ClaimCheck
from palimpsest.common.bus.claim_check_store import StoreClaims
from palimpsest.common.bus.kafka import Connection, KafkaBus, Settings, WrongTopic
from palimpsest.common.bus.kafka.consumer import KafkaConsumer
from palimpsest.common.bus.port import OffsetGone, Outgoing
from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TOPICS,
    TRAJECTORIES,
    DeadLetter,
    TrajectoryFinished,
    decode,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.service import Server
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.storage_minio import MinioStorage
from tests.contract.logs import LIMIT_S, TOPIC, bodies, take, things
from tests.learner_parts.ingest import an_ingest
from tests.processes.waiting import until
from tests.records.builders import a_finished, a_segment
from tests.servers.backends import s3_client
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio

pytestmark = pytest.mark.servers

SETTINGS = Settings(retention_ms=3_600_000, max_record_bytes=1 << 20)
OVER_BYTES = 1 << 19
LONG = 128 * 1024
"""Tokens of a long trajectory."""


@pytest.fixture
def admin(kafka_server: Kafka) -> Iterator[KafkaAdminClient]:
    with closing(KafkaAdminClient(bootstrap_servers=kafka_server.servers)) as admin:
        yield admin


@pytest.fixture
def prefix() -> str:
    return f"topics.{uuid.uuid4().hex[:8]}."


@pytest.fixture
def bus(kafka_server: Kafka, prefix: str) -> Iterator[KafkaBus]:
    with closing(a_bus(kafka_server, prefix)) as bus:
        yield bus


def a_bus(kafka: Kafka, prefix: str, settings: Settings = SETTINGS) -> KafkaBus:
    return KafkaBus(Connection(kafka.servers, {}), prefix=prefix, settings=settings)


def settings_of(admin: KafkaAdminClient, topic: str) -> dict[str, str]:
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all")
    return {option: entry["value"] for option, entry in found["topic"][topic].items()}


def make(admin: KafkaAdminClient, topic: str, partitions: int = 2, **options: str) -> None:
    """Create a topic as another user would."""
    configs = {name.replace("_", "."): value for name, value in options.items()}
    admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1, "configs": configs}})
    admin.wait_for_topics([topic])


def test_a_new_topic_has_the_configured_settings(bus: KafkaBus, prefix: str, admin: KafkaAdminClient) -> None:
    bus.create_topics({TOPIC: 3})
    assert (
        settings_of(admin, prefix + TOPIC).items()
        >= {
            "cleanup.policy": "delete",
            "retention.ms": "3600000",
            "retention.bytes": "-1",
            "max.message.bytes": "1048576",
            "min.insync.replicas": "1",
        }.items()
    )
    (topic,) = admin.describe_topics([prefix + TOPIC])
    assert [len(partition["replica_nodes"]) for partition in topic["partitions"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("standing", "mend"),
    [
        ({"retention_ms": "1000"}, "retention.ms=3600000"),
        ({"retention_bytes": "1000000"}, "retention.bytes=-1"),
        ({"max_message_bytes": "65536"}, "max.message.bytes=1048576"),
        ({"cleanup_policy": "compact"}, "cleanup.policy=delete"),
        ({"retention_ms": "1000", "cleanup_policy": "compact,delete"}, "cleanup.policy=delete,retention.ms=3600000"),
    ],
)
def test_a_topic_with_too_strict_settings_is_refused_with_the_command_that_fixes_it(
    bus: KafkaBus, kafka_server: Kafka, prefix: str, admin: KafkaAdminClient, standing: Mapping[str, str], mend: str
) -> None:
    make(admin, prefix + TOPIC, **standing)
    with pytest.raises(WrongTopic) as error:
        bus.create_topics({TOPIC: 2})
    command = (
        f"kafka-configs.sh --bootstrap-server {kafka_server.servers} --alter --entity-type topics "
        f"--entity-name {prefix}{TOPIC} --add-config {mend}"
    )
    assert str(error.value).endswith(command)
    with pytest.raises(WrongTopic):
        bus.create_topics({TOPIC: 2})
    alter(admin, command)
    bus.create_topics({TOPIC: 2})
    bus.publish(TOPIC, things("a"))


def alter(admin: KafkaAdminClient, command: str) -> None:
    """Apply the change that the command describes."""
    named = re.search(r"--entity-name (\S+) --add-config (\S+)$", command)
    assert named
    options = dict(option.split("=") for option in named[2].split(","))
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, named[1], options)])
    until(lambda: settings_of(admin, named[1]).items() >= options.items())  # the broker learns it from the controller


def test_a_topic_with_larger_limits_is_accepted(bus: KafkaBus, prefix: str, admin: KafkaAdminClient) -> None:
    make(admin, prefix + TOPIC, retention_ms="-1", max_message_bytes="9000000")
    bus.create_topics({TOPIC: 2})


def test_too_few_replicas_and_a_different_number_of_partitions_are_refused(
    bus: KafkaBus, kafka_server: Kafka, prefix: str, admin: KafkaAdminClient
) -> None:
    make(admin, prefix + TOPIC, retention_ms="-1")
    with pytest.raises(WrongTopic, match="has 2 partitions; the run needs 3"):
        bus.create_topics({TOPIC: 3})
    with closing(a_bus(kafka_server, prefix, Settings(replicas=3, retention_ms=1000))) as replicated:
        with pytest.raises(
            WrongTopic, match=r"has 1 replicas; bus.replicas is 3: add replicas with kafka-reassign-partitions.sh"
        ) as error:
            replicated.create_topics({TOPIC: 2})
        assert "The number of partitions cannot change" not in str(error.value)
        with pytest.raises(WrongTopic, match=r"cannot be created with 3 replicas \(bus.replicas\)"):
            replicated.create_topics({"more": 1})


def finished(record: TrajectoryFinished) -> Outgoing:
    return Outgoing(record.group, encode(record), {"trajectory": record.trajectory})


def cut(admin: KafkaAdminClient, topic: str, partition: int, before: int) -> None:
    """Delete the partition's records below this offset, as retention does."""
    admin.delete_records({TopicPartition(topic, partition): before})


def test_a_learner_stops_with_an_error_if_its_next_record_is_deleted(
    bus: KafkaBus, prefix: str, admin: KafkaAdminClient
) -> None:
    bus.create_topics(dict.fromkeys(TOPICS, 1))
    ingest = an_ingest(bus)
    ingest.start({}, {}, {}, now=0.0)
    ingest.tasks.offer(Version(0), now=0.0)
    bus.publish(TRAJECTORIES, [finished(a_finished(0, sample)) for sample in (0, 1)])
    cut(admin, prefix + TRAJECTORIES, 0, before=1)
    with closing(ingest), pytest.raises(OffsetGone, match=r"trajectories\[0\]: offset 0 is gone, the log starts at 1"):
        ingest.reader.read_all(Version(0), timeout_s=LIMIT_S)
    again = an_ingest(bus)
    with closing(again), pytest.raises(UserError, match="would lose trajectories silently") as error:
        again.start({0: 0}, {}, {}, now=0.0)
    assert error.value.code is ExitCode.DAMAGED


def test_the_offset_check_detects_skipped_records(
    bus: KafkaBus, prefix: str, admin: KafkaAdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.create_topics({TOPIC: 1})
    bus.publish(TOPIC, things("a", "b", "c"))
    connect, checked = Connection.client, KafkaConsumer._record

    def skipping(self: Connection, make: Any, **arguments: Any) -> Any:
        return connect(self, make, **{k: "earliest" if k == "auto_offset_reset" else v for k, v in arguments.items()})

    def unchecked(self: KafkaConsumer, partition: int, fetched: Any) -> Any:
        self._next[partition] = fetched.offset
        return checked(self, partition, fetched)

    monkeypatch.setattr(Connection, "client", skipping)
    for check, expected in ((checked, None), (unchecked, ["c"])):
        monkeypatch.setattr(KafkaConsumer, "_record", check)
        with bus.consumer(TOPIC) as consumer:
            cut(admin, prefix + TOPIC, 0, before=2)
            consumer._start_at({0: 1})
            if expected is None:
                with pytest.raises(OffsetGone, match="offset 1 is gone, the next record has offset 2"):
                    take(consumer, 1)
            else:
                assert bodies(take(consumer, 1)) == expected


class Folder:
    """Storage of bodies in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.storage = folder, DiskStorage(folder)

    def lose(self, digest: str) -> None:
        (self._folder / "claims" / digest).unlink()


class Bucket:
    """Storage of bodies in a real MinIO."""

    def __init__(self, minio: Minio) -> None:
        config = SnapshotStoreConfig(storage="s3", endpoint=minio.endpoint, bucket="claims", create_bucket=True)
        self._minio, self._prefix = minio, f"{uuid.uuid4().hex}/"
        asyncio.run(MinioStorage(config, prefix=self._prefix).open())
        self.storage = MinioStorage(config, prefix=self._prefix)

    def lose(self, digest: str) -> None:
        s3_client(self._minio).remove_object("claims", f"{self._prefix}claims/{digest}")


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder | Bucket:
    if request.param == "folder":
        return Folder(tmp_path)
    minio: Minio = request.getfixturevalue("minio_server")
    monkeypatch.setenv("MINIO_ACCESS_KEY", minio.access_key)
    monkeypatch.setenv("MINIO_SECRET_KEY", minio.secret_key)
    return Bucket(minio)


def test_a_long_trajectory_is_read_unchanged_and_a_lost_body_is_dead_lettered(
    bus: KafkaBus, kafka_server: Kafka, prefix: str, place: Folder | Bucket
) -> None:
    bus.create_topics(dict.fromkeys(TOPICS, 1))
    app = create_app(place.storage, sweep_s=3600)
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as store:
        claims = StoreClaims(SnapshotClient(f"http://127.0.0.1:{store.port}"))
        with closing(ClaimCheck(a_bus(kafka_server, prefix), claims, over_bytes=OVER_BYTES)) as checked:
            long = a_finished(0, 0, tokens=LONG, segments=(a_segment(2, LONG, 0),))
            assert len(encode(long)) > 1 << 20
            ingest = an_ingest(checked, most_tokens=LONG)
            with closing(ingest):
                ingest.start({}, {}, {}, now=0.0)
                ingest.tasks.offer(Version(0), now=0.0)
                checked.publish(TRAJECTORIES, [finished(long), finished(a_finished(0, 1))])
                read_until(ingest.reader, 2)
                assert ingest.reader.arrived[long.trajectory].record == long
            with bus.consumer(TRAJECTORIES) as consumer:
                on_the_topic = take(consumer, 2)[0]
            assert on_the_topic.body == b""
            assert sum(len(name) + len(value) for name, value in on_the_topic.headers.items()) < 200
            place.lose(on_the_topic.headers[CLAIM])
            ingest = an_ingest(checked, most_tokens=LONG)
            with closing(ingest):
                ingest.start({}, {}, {}, now=0.0)
                read_until(ingest.reader, 1)
            with bus.consumer(DEAD_LETTERS) as consumer:
                letter: DeadLetter = decode(DEAD_LETTERS, take(consumer, 1)[0].body)
            assert letter.cause is RejectCause.MISSING_CLAIM
            assert (letter.topic, letter.offset) == (TRAJECTORIES, 0)


def read_until(reader: TrajectoryReader, arrived: int) -> None:
    """Read until `arrived` trajectories have arrived."""
    for _ in range(int(LIMIT_S)):
        reader.read_all(Version(0), timeout_s=1.0)
        if len(reader.arrived) == arrived:
            return
    raise AssertionError(f"{len(reader.arrived)} of {arrived} trajectories arrived")
