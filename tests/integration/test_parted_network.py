"""Services whose network is parted: nothing is lost, and the work continues when the network is joined again."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.common.bus.kafka import Connection, KafkaBus
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version
from tests.contract.logs import LIMIT_S, PARTITIONS, TOPIC, bodies, take, things
from tests.servers.parted_network import PartedNetwork
from tests.servers.stores import FolderStore
from tools.backends.kafka import Kafka

pytestmark = pytest.mark.servers

PARTITIONED = pytest.mark.parametrize(
    ("replies_only", "reset"), [(False, False), (True, True)], ids=["both ways", "one way, connections lost"]
)


@pytest.fixture
def network() -> Iterator[PartedNetwork]:
    with PartedNetwork() as network:
        yield network


@PARTITIONED
def test_no_record_is_lost_between_a_service_and_kafka(
    kafka_server: Kafka, network: PartedNetwork, replies_only: bool, reset: bool
) -> None:
    connection = Connection(
        kafka_server.servers, {"socks5_proxy": f"socks5://127.0.0.1:{network.port}"}, outage_limit_s=LIMIT_S
    )
    with closing(KafkaBus(connection, prefix=f"parted.{uuid.uuid4().hex[:8]}.")) as bus, ThreadPoolExecutor(1) as pool:
        bus.create_topics({TOPIC: PARTITIONS})
        with bus.consumer(TOPIC) as consumer:
            bus.publish(TOPIC, things("a"))
            assert bodies(take(consumer, 1)) == ["a"]
            network.cut(replies_only=replies_only)
            publishing = pool.submit(bus.publish, TOPIC, things("b", "c"))
            assert network.held.wait(LIMIT_S)
            assert consumer.poll(limit=10, timeout_s=0.2) == []
            assert not publishing.done()
            network.heal(reset=reset)
            places = publishing.result()
            found = {(record.partition, record.offset): record.body for record in take(consumer, 2)}
            assert [found[at.partition, at.offset] for at in places] == [b"b", b"c"]


@PARTITIONED
def test_a_request_to_the_store_ends_when_the_network_is_joined(
    tmp_path: Path, replies_only: bool, reset: bool
) -> None:
    with (
        FolderStore(tmp_path, sweep_s=3600) as store,
        PartedNetwork(("127.0.0.1", store.port)) as network,
        SnapshotClient(f"http://127.0.0.1:{network.port}", patience_s=LIMIT_S) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        assert client.newest_writer() == 0
        network.cut(replies_only=replies_only)
        leasing = pool.submit(client.lease, "learner", Version(3))
        assert network.held.wait(LIMIT_S)
        assert not leasing.done()
        network.heal(reset=reset)
        leasing.result()
        with SnapshotClient(store.url) as direct:
            assert direct.request("GET", "/v1/status")["leases"] == {"learner": 3}
