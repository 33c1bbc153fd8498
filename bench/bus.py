"""Rates of publishing and reading trajectories on a real Kafka, through the log and through two client libraries.

python -m bench bus [--servers=HOST:PORT] [--rounds 8] [--mebibytes 32] [--tokens 2048 16384]

Without --servers the program starts a Kafka in a temporary folder. In every round each client publishes the same
records to its own topic; then each client reads the records that `ours` published. Readers connect and seek before the
clock starts. The alternation exposes all clients to the same load of the machine. In the first round, which is not
counted, each client reads its own topic. Figures are medians over the rounds; a ratio is the median of the ratios of
the rounds.

Then each client in turn publishes single records and waits for each, as the learner does between two versions.

`bare` is kafka-python with our batch size, `bare_defaults` with its default (both read alike, so only `bare` is
reported for reading). All clients wait for every replica (acks=all) and are idempotent. Ratios compare `ours` with the
faster of the two. Our records pass the claim check, as in a run.
"""

import argparse
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.clients import Client, clients
from bench.records import Maker
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import group_id
from tools.backends.downloads import kafka_version
from tools.backends.kafka import Kafka

SAMPLES = 8
"""Trajectories of a group. They share a key."""
BARE = ("bare", "bare_defaults")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock and CPU seconds of a client in a round."""

    publish: float
    publish_cpu: float
    consume: float
    consume_cpu: float


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of all clients and our ratios to kafka-python."""
    options = _options(arguments)
    with ExitStack() as stack:
        servers = options.servers
        if not servers:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-bench-"))
            servers = stack.enter_context(Kafka(Path(folder) / "kafka")).servers
        named = clients(servers, f"bench.{uuid.uuid4().hex[:8]}.")
        for client in named.values():
            stack.enter_context(closing(client))
        sizes = {}
        for tokens in options.tokens:
            records = _records(tokens, options.mebibytes << 20)
            sizes[tokens] = _figures(records, _rounds(named, records, options.rounds))
            _show(tokens, sizes[tokens])
        single = _single(named, _records(min(options.tokens), 0)[0], options.single)
        print(f"  one record, acknowledged, median ms: {single}", flush=True)
    return {
        "name": "bus",
        "publish_ratio_to_bare": min(size["publish_ratio_to_bare"] for size in sizes.values()),
        "consume_ratio_to_bare": min(size["consume_ratio_to_bare"] for size in sizes.values()),
        "single_record_ms": single,
        "sizes": {str(tokens): size for tokens, size in sizes.items()},
        "rounds": options.rounds,
        "kafka": "" if options.servers else kafka_version(),
        "kafka_python": version("kafka-python"),
        "confluent_kafka": version("confluent-kafka"),
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m bench bus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--servers", default="", help="address of a running Kafka")
    options.add_argument("--rounds", type=int, default=8, help="counted rounds")
    options.add_argument("--mebibytes", type=int, default=32, help="MiB that each client publishes in a round")
    options.add_argument("--single", type=int, default=300, help="records that each client publishes one at a time")
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384], help="lengths of trajectories")
    return options.parse_args(arguments)


def _records(tokens: int, size: int) -> list[Outgoing]:
    """Return trajectories of this length with about `size` bytes in total."""
    maker = Maker(seed=tokens)
    one = maker.outgoing(maker.finished(group_id(0), 0, tokens=tokens))
    count = max(1, size // len(one.body))
    return [maker.outgoing(maker.finished(group_id(i // SAMPLES), i % SAMPLES, tokens=tokens)) for i in range(count)]


def _rounds(named: Mapping[str, Client], records: Sequence[Outgoing], rounds: int) -> list[dict[str, Seconds]]:
    """Return the seconds of every counted round by client."""
    wanted = _digest([record.body for record in records])
    own = {name: client.topic for name, client in named.items()}
    _round(named, records, wanted, own, turn=0)
    return [
        _round(named, records, wanted, dict.fromkeys(named, own["ours"]), turn=turn) for turn in range(1, rounds + 1)
    ]


def _round(
    named: Mapping[str, Client], records: Sequence[Outgoing], wanted: str, topics: Mapping[str, str], *, turn: int
) -> dict[str, Seconds]:
    """Publish with every client, then read its topic of `topics` with every client. Checks the records read."""
    order = _order(list(named), turn)
    published, consumed = {}, {}
    with ExitStack() as stack:
        readers = {name: stack.enter_context(closing(named[name].reader(topics[name]))) for name in order}
        for name in order:
            began = _now()
            named[name].publish(records)
            published[name] = _since(began)
        for name in order:
            began = _now()
            bodies = readers[name].read(len(records))
            consumed[name] = _since(began)
            assert (len(bodies), _digest(bodies)) == (len(records), wanted), (
                f"{name} read records that were not published"
            )
    return {name: Seconds(*published[name], *consumed[name]) for name in named}


def _single(named: Mapping[str, Client], record: Outgoing, count: int) -> dict[str, float]:
    """Return the median milliseconds until one record is acknowledged, by client. The clients take turns."""
    taken: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(count):
        for name, client in named.items():
            began = time.perf_counter()
            client.publish([record])
            taken[name].append(time.perf_counter() - began)
    return {name: round(median(seconds) * 1000, 3) for name, seconds in taken.items()}


def _order(names: list[str], turn: int) -> list[str]:
    """Return the order of clients. Over 2 * len(names) rounds each client has every position, in both directions.

    >>> [_order(["a", "b", "c"], turn) for turn in range(4)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a'], ['a', 'c', 'b']]
    """
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if turn % 2 else order


def _now() -> tuple[float, float]:
    """Return wall-clock and CPU time, seconds."""
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds since `began`."""
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _digest(bodies: Sequence[bytes]) -> str:
    """Return the digest of the bodies, independent of their order."""
    return blake2b(b"".join(sorted(blake2b(body).digest() for body in bodies))).hexdigest()


def _figures(records: Sequence[Outgoing], rounds: Sequence[dict[str, Seconds]]) -> dict[str, Any]:
    """Return the rates by client for one length, and our ratio to the faster bare client."""
    size = sum(len(record.body) for record in records)
    figures: dict[str, Any] = {"records": len(records), "record_bytes": size // len(records)}
    for what in ("publish", "consume"):
        names = [name for name in sorted(rounds[0]) if (what, name) != ("consume", "bare_defaults")]
        seconds = {name: _each(rounds, name, what) for name in names}
        figures[what] = {
            name: {
                "records_per_s": round(len(records) / median(taken)),
                "megabytes_per_s": round(size / median(taken) / 1e6, 1),
                "cpu_us_per_record": round(median(_each(rounds, name, f"{what}_cpu")) / len(records) * 1e6),
                "ratio_of_ours": round(median(t / ours for t, ours in zip(taken, seconds["ours"], strict=True)), 3),
            }
            for name, taken in seconds.items()
        }
        figures[f"{what}_ratio_to_bare"] = min(
            figures[what][name]["ratio_of_ours"] for name in BARE if name in figures[what]
        )
    return figures


def _each(rounds: Sequence[dict[str, Seconds]], name: str, what: str) -> list[float]:
    """Return the seconds of a client by round."""
    return [getattr(by_client[name], what) for by_client in rounds]


def _show(tokens: int, figures: dict[str, Any]) -> None:
    print(f"{figures['records']} trajectories of {tokens} tokens, {figures['record_bytes']} bytes each")
    print(f"  {'':8} {'':14} {'records/s':>10} {'MB/s':>8} {'CPU us/record':>14} {'ours is':>9}")
    for what in ("publish", "consume"):
        for name, of in figures[what].items():
            print(
                f"  {what:8} {name:14} {of['records_per_s']:10} {of['megabytes_per_s']:8} "
                f"{of['cpu_us_per_record']:14} {of['ratio_of_ours']:8.2f}x",
                flush=True,
            )
