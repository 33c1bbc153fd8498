"""summary.json and report.html from a run's folder, and from a complete short run."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil
import pytest

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TASKS, TRAJECTORIES, WORKERS, VersionApplied, WorkerAlive, encode
from palimpsest.common.versions import Version
from palimpsest.run import conclude
from tests.processes.programs import run_program
from tests.processes.waiting import LIMIT_S, until
from tests.records.builders import a_finished
from tests.records.history_lines import a_line

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
TITLES = (
    "Success and reward over versions",
    "Success against wall-clock",
    "Discrepancy and staleness ratio against staleness",
    "|log discrepancy| over versions, per staleness",
    "|log staleness ratio| over versions, per staleness",
    "Masked and clipped tokens by staleness",
    "Staleness of the trained tokens over versions",
    "Trained and lost tokens by duration and length",
    "Timeline of versions, updates and cuts",
    "Where the learner&#x27;s time went",
    "Ledger of trajectories",
    "Configuration",
)
RUN = 'run.id = "test"\nmodel.path = "a<b>"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
SCRIPTED = """
run.id = "short"
run.folder = "{folder}"
model.path = "{model}"
model.attention = "eager"
tasks.environments = {{ lookup = 1.0 }}
tasks.samples_per_group = 4
sampling = {{ max_turn_tokens = 8, max_trajectory_tokens = 96, max_turns = 2 }}
rollout.engine = {{ kind = "scripted", texts = ["1", "2", "3"], tokens_per_s = 200.0 }}
learner.versions = {versions}
learner.groups_per_batch = 4
"""


class _Loaded(HTMLParser):
    """Collects every attribute by which a page loads another file."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [
            f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "data", "action")
        ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three versions, resumed once, on two workers."""
    (tmp_path / "run.toml").write_text(RUN)
    stale = {0: {"tokens": 20.0}, 1: {"tokens": 60.0, "log_staleness_ratio_abs": 0.04, "clipped": 0.1}}
    lines = [
        a_line(0, seconds=30.0, phases={"wait": 28.0, "train": 1.0}),
        a_line(1, seconds=31.0, tokens=stale),
        a_line(2, seconds=60.0, tokens=stale, phases={"wait": 20.0, "train": 1.0}, successes="11"),
    ]
    (tmp_path / "history.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    (tmp_path / "seconds.json").write_text('{"setup": 50.0, "run": 16.0}')
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics({TASKS: 8, TRAJECTORIES: 4, "control": 1, WORKERS: 1, "old_logprobs": 1, "dead_letters": 1})
    bus.publish(TRAJECTORIES, [Outgoing("g000000", encode(a_finished(0, sample))) for sample in range(4)])
    messages = [
        message
        for worker in ("worker-0", "worker-1")
        for message in (
            VersionApplied("test", worker, Version(1), "", True, 0.01, 0.1, 3),
            WorkerAlive("test", worker, version=1, live=2, sampled_tokens=80, seconds=8.0, idle_s=2.0),
        )
    ]
    bus.publish(WORKERS, [Outgoing("w", encode(message)) for message in messages])
    bus.close()
    return tmp_path


def figures(page: str) -> list[dict[str, Any]]:
    embedded = re.search(r"<script>const FIGURES = (\[.*\]);$", page, re.MULTILINE)
    assert embedded is not None
    found: list[dict[str, Any]] = json.loads(embedded[1])
    return found


def test_the_report_has_every_figure_and_loads_no_other_file(folder: Path):
    conclude(folder)
    page = (folder / "report.html").read_text()
    for title in TITLES:
        assert title in page
    loaded = _Loaded()
    loaded.feed(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert loaded.found == []
    assert "default-src 'none'" in page  # the browser refuses loads too
    assert not re.search(
        r"@import|url\(|<link|<iframe|<img", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    )
    assert page.count("* plotly.js v") == 1
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page


def test_every_axis_has_a_title(folder: Path):
    conclude(folder)
    for figure in figures((folder / "report.html").read_text()):
        for name, axis in figure["layout"].items():
            if re.fullmatch(r"[xy]axis\d*", name) and axis.get("showticklabels", True) and "matches" not in axis:
                assert axis.get("title", {}).get("text"), (name, axis)


def test_the_figures_show_the_numbers_of_the_run(folder: Path):
    summary = conclude(folder)
    key = figures((folder / "report.html").read_text())[2]["data"]
    by_name = {trace["name"]: trace for trace in key if "name" in trace}
    staleness_ratio = next(trace for name, trace in by_name.items() if name.startswith("staleness ratio"))
    assert (staleness_ratio["x"], staleness_ratio["y"]) == ([0, 1], [0.02, 0.04])
    assert by_name["tokens"]["y"] == [50, 120]
    assert summary["tokens_by_staleness"] == {"0": 50, "1": 120}


def test_the_summary_is_written_with_the_report(folder: Path):
    conclude(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["versions"] == 3
    assert summary["tokens_trained"] == 170
    assert (summary["success_first"], summary["success_last"]) == (0.0, 1.0)
    assert summary["seconds"] == {"setup": 50.0, "run": 16.0}
    assert summary["tokens_per_second"] == {"rollout": 20.0, "learner": 10.625}
    assert summary["rollout_wait_share"] == 0.25
    assert summary["update_pause_ms_p50"] == 100.0


def test_a_run_stopped_before_its_first_version_has_a_report_and_a_summary(tmp_path: Path):
    (tmp_path / "run.toml").write_text(RUN)
    conclude(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("there is no data to draw") == len(TITLES) - 2
    assert json.loads((tmp_path / "summary.json").read_text())["success_last"] is None


def start(*arguments: str | Path, fault: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "palimpsest", "run", *map(str, arguments)]
    environment = {**os.environ, failpoints.VARIABLE: fault}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(lines: IO[str], beginning: str) -> None:
    """Read lines up to one with this beginning; fail if the output ends before it."""
    read = []
    for line in lines:
        if line.startswith(beginning):
            return
        read.append(line)
    raise AssertionError(f"no line begins with {beginning!r}: {''.join(read)}")


def stopped(pid: int) -> list[psutil.Process]:
    """Children of this process that are paused."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_STOPPED:
                found.append(child)
    return found


@pytest.mark.servers
def test_a_second_ctrl_c_ends_the_run_and_prints_the_command_that_continues_it(tmp_path: Path, starting_model: Path):
    file, home = tmp_path / "short.toml", tmp_path / "short"
    file.write_text(SCRIPTED.format(folder=tmp_path, model=starting_model, versions=100_000))
    run = start(
        file, fault="rollout.start:1:STOP"
    )  # a stopped worker does not end by a signal, so the clean stop waits
    assert run.stdout is not None
    until(lambda: stopped(run.pid) != [], "the pause of the worker")
    (worker,) = stopped(run.pid)
    try:
        run.send_signal(signal.SIGINT)
        read_until(run.stdout, "stopping ...")
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=LIMIT_S)
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    assert run.returncode == 130, output
    assert "Ended without a clean stop. Continue with:\n" in output
    assert f"palimpsest run --resume {home}" in output


@pytest.mark.servers
def test_a_run_stopped_by_ctrl_c_prints_the_command_that_resumes_it(tmp_path: Path, starting_model: Path):
    file, home = tmp_path / "short.toml", tmp_path / "short"
    file.write_text(SCRIPTED.format(folder=tmp_path, model=starting_model, versions=100_000))
    run = start(file)
    assert run.stdout is not None
    history = home / "history.jsonl"
    until(lambda: run.poll() is not None or (history.exists() and history.stat().st_size > 0), "a trained version")
    assert run.poll() is None, run.stdout.read()
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 130, output
    assert output.index("stopping ...") < output.index("Stopped cleanly after")
    assert f"palimpsest run --resume {home}" in output
    stopped = json.loads((home / "summary.json").read_text())
    assert stopped["versions"] >= 1
    assert not stopped["finished"]
    counts = stopped["trajectories"]
    assert counts["offered"] == counts["trained"] + sum(counts["dropped"].values()) + counts["pending"]
    assert (home / "report.html").exists()
    assert not (home / "model").exists(), "a stopped run does not export"
    assert f"palimpsest export {home} {home / 'model'}\n" in output
    exported = run_program("palimpsest", "export", home, home / "model")
    assert exported.code == 0, exported.err

    more = stopped["versions"] + 2
    again = start("--resume", home, f"--learner.versions={more}")
    output, _ = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, output
    assert f"Resuming run short in {home}" in output
    assert f"{more} versions in" in output
    newest = max(int(path.stem) for path in (home / "snapshots" / "versions").iterdir())
    assert output.endswith(f"\nmodel: {home / 'model'} (version {newest})\n")
    assert f"| version | {newest} |" in (home / "model" / "README.md").read_text(), (
        "the new export replaces the earlier one"
    )
    done = json.loads((home / "summary.json").read_text())
    assert (done["versions"], done["finished"], done["engine"]) == (more, True, "scripted")
    assert done["seconds"]["setup"] > stopped["seconds"]["setup"]
    assert done["refused_versions"] == done["trajectories"]["dead_lettered"] == 0
