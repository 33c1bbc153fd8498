"""Fuzz the readers of records by hand.

python -m tests.fuzz --records=100000 --bus=sqlite --seed=1
python -m tests.fuzz --records=100000 --bus=kafka --seed=1     (starts a Kafka of its own)
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from palimpsest.common import logs
from palimpsest.common.bus.kafka import Connection, KafkaBus, Settings
from palimpsest.common.bus.port import Bus
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TOPICS
from tests.fuzz.fuzzer import fuzz
from tests.fuzz.readers import PARTITIONS
from tools.backends.kafka import Kafka

SETTINGS = Settings(max_record_bytes=1 << 22)
"""Keys and headers of the records are long too."""


def main() -> None:
    """Run the fuzzer and print its figures. Raises AssertionError for a record that is not accounted for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--bus", choices=("sqlite", "kafka"), default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    logs.configure("fuzz", "error", "text")  # each dead letter is a warning
    with tempfile.TemporaryDirectory() as folder, opened(chosen.bus, Path(folder)) as bus:
        bus.create_topics(dict.fromkeys(TOPICS, PARTITIONS))
        print(fuzz(bus, chosen.records, seed=chosen.seed), flush=True)


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Bus]:
    """A log of this kind in an empty folder, with its server."""
    if kind == "sqlite":
        with closing(SqliteBus(folder / "bus.sqlite")) as bus:
            yield bus
    else:
        with (
            Kafka(folder / "kafka") as kafka,
            closing(KafkaBus(Connection(kafka.servers, {}), prefix="fuzz.", settings=SETTINGS)) as bus,
        ):
            yield bus


if __name__ == "__main__":
    main()
