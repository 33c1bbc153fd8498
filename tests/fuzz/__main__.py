"""Fuzz the readers of records by hand.

python -m tests.fuzz --records=100000 --bus=sqlite --seed=1
"""

import argparse
import tempfile
from contextlib import closing
from pathlib import Path

from palimpsest.common import logs
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TOPICS
from tests.fuzz.fuzzer import fuzz


def main() -> None:
    """Run the fuzzer and print its figures. Raises AssertionError for a record that is not accounted for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--bus", choices=("sqlite",), default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    logs.configure("fuzz", "error", "text")  # each dead letter is a warning
    with tempfile.TemporaryDirectory() as folder, closing(SqliteBus(Path(folder) / "bus.sqlite")) as bus:
        bus.create_topics(dict.fromkeys(TOPICS, 2))
        print(fuzz(bus, chosen.records, seed=chosen.seed), flush=True)


if __name__ == "__main__":
    main()
