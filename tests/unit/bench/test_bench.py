"""Every benchmark runs with small settings and prints one JSON line; the measured values are not checked."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import bus, log_share
from bench.records import VOCABULARY, Maker
from bench.runs import run
from bench.simulated_streams import Streams, _Driver
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import TRAJECTORIES, GroupOffered, TrajectoryFinished, decode, group_id
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.validation import check_finished
from tests.records.builders import SAMPLING
from tests.runs.run_process import scripted
from tools.backends.kafka import Kafka

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[3]
SMALL_RUN = ("--streams=24", "--tokens=64", "--seconds=1", "--pace=0.05", "--processes=2", "--duplicates=0.1")
INGEST_KEYS = {
    "trajectories_per_s", "tokens_per_s", "megabytes_per_s", "cpu_s_per_trajectory", "rss_mb", "rss_slope_mb_per_min",
    "lag", "streams", "bus",
}  # fmt: skip


MEMORY_CASE = ("--tokens=64", "--vocabularies=512", "--hidden=8", "--chunk=16", "--repeats=1")


def measured(*arguments: str) -> dict[str, Any]:
    """Run `python -m bench` and return the JSON object in its last line of output."""
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_the_list_names_every_program() -> None:
    done = subprocess.run([sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert names == {
        "learner",
        "log_share",
        "loop",
        "bus",
        "gateway",
        "ingest",
        "memory",
        "mismatch",
        "peers",
        "rollout",
        "routes",
        "snapshots",
        "tail",
        "worlds",
    }


def assert_every_trajectory_is_counted(figures: dict[str, Any]) -> None:
    """Check that the ledger's counts add up and do not exceed the records read."""
    counts = figures["trajectories"]
    ended = counts["trained"] + sum(counts["dropped"].values())
    assert counts["offered"] == ended + counts["pending"]
    assert 0 < ended <= figures["records_read"]
    assert len(figures["lag"]) == len(figures["rss_mb"]) > 2
    assert all(megabytes > 10 for _, megabytes in figures["rss_mb"])


def test_ingest_on_one_file() -> None:
    figures = measured("ingest", *SMALL_RUN)
    assert figures.keys() >= INGEST_KEYS
    assert (figures["bus"], figures["streams"]) == ("sqlite", 24)
    assert_every_trajectory_is_counted(figures)


@pytest.mark.servers
def test_ingest_on_kafka(kafka_server: Kafka) -> None:
    figures = measured("ingest", *SMALL_RUN, "--bus=kafka", f"--servers={kafka_server.servers}")
    assert figures.keys() >= INGEST_KEYS
    assert figures["bus"] == "kafka"
    assert_every_trajectory_is_counted(figures)


@pytest.mark.servers
def test_the_bus_is_compared_with_bare_clients(kafka_server: Kafka) -> None:
    small = ("--rounds=1", "--mebibytes=1", "--single=2", "--tokens", "64", "256")
    figures = measured("bus", f"--servers={kafka_server.servers}", *small)
    assert figures.keys() >= {"publish_ratio_to_bare", "consume_ratio_to_bare", "sizes", "kafka", "rounds"}
    assert figures["sizes"].keys() == {"64", "256"}
    assert figures["single_record_ms"].keys() == {"ours", "bare", "bare_defaults", "confluent"}
    for size in figures["sizes"].values():
        for what in ("publish", "consume"):
            assert size[what].keys() >= {"ours", "bare", "confluent"}
            assert figures[f"{what}_ratio_to_bare"] <= size[f"{what}_ratio_to_bare"]


def test_ratios_are_relative_to_the_faster_bare_client() -> None:
    """Two rounds of 10 records take 2 s and 4 s with ours, 1 s and 3 s with bare, 3 s and 6 s with bare defaults."""
    taken = {"ours": (2.0, 4.0), "bare": (1.0, 3.0), "bare_defaults": (3.0, 6.0)}
    rounds = [{name: bus.Seconds(seconds[i], 0.5, 1.0, 0.25) for name, seconds in taken.items()} for i in range(2)]
    figures = bus._figures([Outgoing("k", b"x" * 1000)] * 10, rounds)
    assert figures["publish"]["ours"]["records_per_s"] == round(10 / 3)
    assert figures["publish"]["bare"]["ratio_of_ours"] == (1 / 2 + 3 / 4) / 2
    assert figures["publish_ratio_to_bare"] == (1 / 2 + 3 / 4) / 2
    assert figures["consume_ratio_to_bare"] == 1.0
    assert figures["consume"]["bare"]["cpu_us_per_record"] == 25_000


def test_the_share_of_the_log_is_that_of_the_learners_main_thread_between_two_versions() -> None:
    """10 s from version to version: 1.2 s of publishing and 0.55 s of polling on the main thread, 4 s on another."""
    learner = [
        call("publish", at=100.0, wall=9.0, version=True),
        cpu(100.5, 5.0, 1.0),
        call("publish", at=103.0, wall=0.9),
        call("poll", at=104.0, wall=6.0, cpu=0.55),
        call("publish", at=105.0, wall=4.0, main=False),
        cpu(109.0, 13.0, 3.0),
        call("publish", at=110.0, wall=0.3, version=True),
        call("poll", at=111.0, wall=3.0, cpu=3.0),
    ]
    worker = [call("poll", at=50.0, wall=1.0)]
    figures = log_share.shares([worker, learner], publish_times=3.0, consume_times=5.5)
    assert (figures["versions"], figures["seconds"]) == (1, 10.0)
    assert (figures["critical_publish_share"], figures["critical_poll_share"]) == (0.12, 0.055)
    assert figures["saved_share"] == 0.08 + 0.045
    assert figures["learner"]["other_threads"]["publish_s"] == 4.0
    assert figures["learner"]["library_share"] == 0.25
    assert figures["others"] == []


def call(
    what: str, *, at: float, wall: float, cpu: float = 0.0, main: bool = True, version: bool = False
) -> dict[str, Any]:
    return {
        "at": at, "what": what, "wall": wall, "cpu": cpu, "main": main, "version": version, "records": 1, "bytes": 9,
    }  # fmt: skip


def cpu(at: float, process: float, library: float) -> dict[str, Any]:
    return {"at": at, "cpu": {"process": process, "library": library}}


@pytest.mark.servers
@pytest.mark.long
def test_the_share_of_the_log_is_measured_in_a_run(kafka_server: Kafka, tmp_path: Path, starting_model: Path) -> None:
    """With the scripted engine: the calls of learner and worker are noted, and the learner publishes each version."""
    file = scripted(tmp_path, starting_model, versions=4)
    figures = measured("log_share", f"--run={file}", "--versions=4", f"--servers={kafka_server.servers}")
    assert figures["versions"] == 4
    assert 0 < figures["saved_share"] < figures["critical_share"] < 1
    assert figures["learner"]["read"] > 0
    assert any(one["published"] for one in figures["others"])


class FixedClient:
    """A client that returns given records, whatever was published."""

    topic = "own"

    def __init__(self, read: list[bytes]) -> None:
        self._read = read

    def publish(self, records: Sequence[Outgoing]) -> None:
        pass

    def reader(self, topic: str) -> "FixedClient":
        return self

    def read(self, count: int) -> list[bytes]:
        return self._read

    def close(self) -> None:
        pass


@pytest.mark.parametrize("read", [[b"a"], [b"a", b"a"], [b"a", b"b", b"b"], [b"a", b"c"]])
def test_a_client_that_reads_other_records_is_an_error(read: list[bytes]) -> None:
    records = [Outgoing("k", b"a"), Outgoing("k", b"b")]
    correct = FixedClient([b"b", b"a"])
    assert len(bus._rounds({"ours": correct, "bare": correct}, records, 2)) == 2
    with pytest.raises(AssertionError, match="bare read records that were not published"):
        bus._rounds({"ours": correct, "bare": FixedClient(read)}, records, 1)


@pytest.mark.long
def test_the_learner_measures_packed_rows_and_their_growth() -> None:
    small = ("--ranks=1", "--layers=1", "--hidden=64", "--vocabulary=1024", "--steps=1")
    rows = ("--rows=3", "--length=40", "--shortest=10", "--micro-batch-tokens=80")
    figures = measured("learner", *small, *rows, "--modes", "packed")
    assert figures["settings"]["tokens"] == 10 + 20 + 40
    assert figures["packed"].keys() == {"tokens_per_s", "seconds", "cpu_seconds", "peak_bytes", "moved_bytes"}
    assert [line["tokens"] for line in measured("learner", *small, "--growth", "32")["growth"]] == [32]


@pytest.mark.parametrize("tokens", [8, 9, 63, 2048])
def test_the_learner_accepts_a_generated_trajectory(tokens: int) -> None:
    made = Maker(1).finished(group_id(3), 2, tokens=tokens, version=5)
    check_finished(made, Version(5), vocabulary=VOCABULARY)
    body = Maker(1).outgoing(made).body
    assert decode(TRAJECTORIES, body) == made
    assert len(made.tokens) == 4 * tokens
    assert tokens // 2 - 4 <= sum(map(len, made.segments)) <= tokens // 2 + 4


def test_streams_end_each_offered_trajectory_once(tmp_path: Path) -> None:
    config = run(tmp_path, {"kind": "sqlite"})
    drivers = [_Driver(Streams(config, i, 2, 5, 16, 0.0, duplicates=0.0, dropped=0.2)) for i in range(2)]
    offers = [GroupOffered("bench", group_id(i), i, Version(0), "lookup", 1, 8, SAMPLING, 60.0) for i in range(20)]
    for driver in drivers:
        for offer in offers:
            driver.offered(offer)
    ended = []
    for driver in drivers:
        driver.finished()  # the streams begin
        while batch := driver.finished():
            ended += [decode(TRAJECTORIES, record.body) for record in batch]
    assert sorted(message.trajectory for message in ended) == sorted(
        f"{group_id(i)}/{s}" for i in range(20) for s in range(8)
    )
    finished = sum(isinstance(message, TrajectoryFinished) for message in ended)
    assert 0 < finished < len(ended)


def test_memory_of_log_probs_before_and_after_chunking() -> None:
    """64 tokens of 512 entries: all logits need 15 bytes an entry or more; a chunk has a quarter of the tokens."""
    figures = measured("memory", *MEMORY_CASE)
    (case,) = figures["cases"]
    assert case["full"]["peak_bytes"] >= 64 * 512 * 15
    assert case["chunked"]["peak_bytes"] < case["full"]["peak_bytes"]
    assert figures["peak_ratio"] == case["chunked"]["peak_bytes"] / case["full"]["peak_bytes"]
    assert case["full"]["tokens_per_s"] > 0 < figures["tokens_per_s_ratio"]


def test_gateway() -> None:
    result = measured("gateway", "--seconds=1", "--sessions=4", "--isolated=2", "--mcp-steps=0")
    (numbers,) = result["by_sessions"].values()
    assert numbers["steps"] == 100
    assert {"overhead_ms_p50", "cpu_ms_per_step", "rss_mb_per_session"} <= numbers.keys()
    assert set(result["isolated_rss_mb_per_session"]) == {"2"}


@pytest.mark.long
def test_gateway_adapters() -> None:
    result = measured("gateway", "--adapters=mcp,ors,openenv", "--steps=19")
    for kind in ("mcp", "ors", "openenv"):
        assert result[kind]["over_direct_ms_p50"] == pytest.approx(
            result[kind]["through_ms_p50"] - result[kind]["direct_ms_p50"], abs=0.002
        )


SNAPSHOTS = (
    "--versions=4",
    "--rates=1e-5",
    "--hidden=32",
    "--layers=1",
    "--vocabulary=300",
    "--tokens=16",
    "--stall-tokens",
    "16",
    "600",
)


@pytest.mark.parametrize("gradients", ["model", "random"])
def test_versions_as_deltas(gradients: str) -> None:
    figures = measured("snapshots", *SNAPSHOTS, f"--gradients={gradients}")
    (case,) = figures["cases"]
    assert figures["stored_ratio"] == case["stored_ratio"] == round(case["full_bytes"] / case["stored_bytes"], 2)
    assert case["bases"] >= 1
    assert case["stall"].keys() == {"16", "600"}
    for stall in case["stall"].values():
        assert {f"{what}_{way}" for what in ("version_s", "stall_share") for way in ("inline", "background")} <= set(
            stall
        )
    assert 0 < case["changed_share"] < 1


def test_the_gateway_measures_an_adapter_over_its_direct_call() -> None:
    figures = measured("gateway", "--adapters=mcp", "--steps=36")
    assert figures["steps"] == 36
    assert figures["mcp"].keys() == {"through_ms_p50", "direct_ms_p50", "over_direct_ms_p50"}
