"""Runs with the interruption route and real processes, one of which dies in the middle of a cut.

The engine is scripted and slow, and in the first run a tool waits for versions, so trajectories are in progress at the
cuts. The tests compare the learner's score of every token with plain transformers under the stored weights of the
version that sampled it.
"""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    ControlChanged,
    OldLogprobsComputed,
    SegmentFlushed,
    VersionPublished,
    decode,
)
from palimpsest.common.page.records import overview
from palimpsest.control_client import ControlClient, url_in
from palimpsest.rescore import Models, rescore
from tests.page.browser import open_browser
from tests.processes.waiting import LIMIT_S
from tests.runs import held_lookup
from tests.runs.endless import ENDLESS, end_after_two_versions, send, several_versions
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, scripted, wait_for

pytestmark = pytest.mark.servers
VERSIONS = 8
LR = "learner.optimizer.lr"
SLOWER, FASTER = 1e-4, 5e-4
"""Learning rates: of `scripted`, and the one that it is changed to."""
LAYOUTS = 5e-3
"""Nats. Largest effect of padding on a log-prob of the small bf16 model."""


def interrupted(
    folder: Path, model: Path, *flags: str, environment: dict[str, str] | None = None
) -> tuple[RunProcess, Path]:
    toml = scripted(folder, model, versions=VERSIONS, tokens_per_s=25.0)
    run = RunProcess(
        toml,
        "--learner.proximal.kind=interruption",
        "--local.rollout_workers=2",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        *flags,
        environment=environment,
    )
    return run, folder / "scripted"


def records(home: Path, topic: str) -> list[Any]:
    bus = SqliteBus(home / "bus.sqlite")
    with bus.consumer(topic) as consumer:
        found = []
        while batch := consumer.poll(limit=1000, timeout_s=0):
            found += [decode(topic, record.body) for record in batch]
    bus.close()
    return found


def check_scores(home: Path, model: Path) -> dict[str, Any]:
    """Every recorded old log-prob equals plain transformers, and no token has scores of different weights."""
    seen = rescore(home / "records", Models(home / "snapshots", str(model), "eager"))
    assert seen["alone_max_abs"] <= LAYOUTS
    digests_of: dict[tuple[Any, ...], set[str]] = {}
    for score in records(home, OLD_LOGPROBS):
        assert isinstance(score, OldLogprobsComputed)
        for token in range(score.start, score.stop):
            digests_of.setdefault((score.trajectory, token, score.version), set()).add(score.digest)
    assert all(len(digests) == 1 for digests in digests_of.values())
    return seen


def flushed_at(home: Path) -> set[int]:
    """The cuts that flushed a trajectory."""
    return {record.cut for record in records(home, TRAJECTORIES) if isinstance(record, SegmentFlushed)}


def missing(home: Path) -> float:
    return sum(line["all"]["missing"] for line in history(home))


def change_the_run(run: RunProcess, home: Path, page: Page) -> tuple[int, int]:
    """Pause the run with the page, cut it, change its learning rate, resume it, and end it after a second pause.

    Returns the number of versions at the two pauses. Two more follow.
    """
    wait_for(lambda: len(history(home)) >= 2, run, name="the second version")
    learner = ControlClient(url_in(home, "learner"))
    page.set_default_timeout(1000 * LIMIT_S)
    page.goto(url_in(home, "learner"))
    outcome = page.get_by_role("status")

    def press(button: str, done: str) -> int:
        """Press a button of the page; return the version at which the change was applied."""
        page.get_by_role("button", name=button, exact=True).click()
        expect(outcome).to_contain_text(f"{done}: applied at version")
        return int((outcome.text_content() or "").rpartition(" ")[2])

    paused = press("Pause training", "pause training")
    expect(page.locator("#waits")).to_contain_text("waits for resume: local paused the training")
    cut = send(learner, "POST", "/v1/actions/cut")
    assert (cut["version"], cut["result"]["workers"], cut["result"]["late"]) == (paused, ["worker-0", "worker-1"], [])
    page.get_by_label("Setting").select_option(LR)
    page.get_by_label("Value (JSON)").fill(str(FASTER))
    assert press("Set", f"{LR}: {SLOWER} → {FASTER}") == paused
    expect(page.locator(".tokens .token[class*='age-']").first).to_be_visible()
    saved = send(learner, "POST", "/v1/actions/checkpoint")["result"]
    assert (saved["version"], saved["nothing_new"]) == (paused, True)
    assert press("Resume", "resume") == paused
    wait_for(lambda: len(history(home)) >= paused + 2, run, name="two versions at the new rate")
    wait_for(lambda: several_versions(home), run, name="a trajectory of several versions")
    wait_for(lambda: len(flushed_at(home)) > 1, run, name="a second cut that flushes")
    later = press("Pause training", "pause training")
    metrics = httpx.get(f"{url_in(home, 'learner')}/metrics", timeout=LIMIT_S).text
    assert f"\npalimpsest_learner_learning_rate {FASTER}\n" in metrics
    assert "\npalimpsest_learner_settings_generation 1.0\n" in metrics
    send(learner, "PATCH", "/v1/settings", {"learner.versions": later + 2, "learner.max_staleness": 5})
    assert press("Resume", "resume") == later
    learner.close()
    return paused, later


def test_cuts_flush_unfinished_trajectories_and_every_token_is_exact(tmp_path: Path, starting_model: Path) -> None:
    """Two ranks. A person pauses the run in a browser, cuts it, and changes its learning rate.

    The audit's records, the history, the report and the metric agree on the change.
    """
    patient = "--learner.proximal.deadline_s=600"  # no process dies here, so a busy machine may take its time
    flags = ("--local.learner_ranks=2", patient, ENDLESS, *held_lookup.FLAGS)  # `change_the_run` sets the end
    environment = {held_lookup.VARIABLE: str(tmp_path / "scripted")}
    run, home = interrupted(tmp_path, starting_model, *flags, environment=environment)
    try:
        with open_browser() as browser:
            paused, later = change_the_run(run, home, browser.new_page())
    except BaseException:
        run.kill_everything()  # it would train for ever
        raise
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    check_whole_groups(check_ledger(home), groups=(later + 2) * 4, samples=4)
    lines = history(home)
    expected = [(0, SLOWER)] * paused + [(1, FASTER)] * (later - paused) + [(2, FASTER)] * 2
    assert [(line["settings"], line["learning_rate"]) for line in lines] == expected
    changes = [record for record in records(home, CONTROL) if isinstance(record, ControlChanged)]
    assert [change.what for change in changes] == [
        "pause", "cut", "settings", "checkpoint", "resume", "pause", "settings", "resume",
    ]  # fmt: skip
    rate = changes[2]
    assert (rate.who, rate.version, rate.before, rate.after) == ("local", paused, {LR: SLOWER}, {LR: FASTER})
    report = (home / "report.html").read_text()
    assert f'<td>{paused}</td><td>local</td><td class="words">{LR}: {SLOWER} -&gt; {FASTER}</td>' in report
    drawn = json.loads(re.search(r"^<script type=\"module\">const RUN = (.*);$", report, re.MULTILINE)[1])  # type: ignore[index]
    first = next(point for point in drawn["points"] if point["settings"] == 1)
    assert (first["version"], first["learning_rate"]) == (paused + 1, FASTER)
    for line in lines:
        recorded = overview(home / "records", line["version"], limit=1000)
        assert sum(one.removed or 0 for one in recorded) == line["removal"]["removed"] > 0
    assert all(line["exact"] for line in lines)
    assert missing(home) == 0
    assert check_scores(home, starting_model)["tokens"] > 500


@pytest.mark.long
def test_versions_that_a_thread_publishes_are_exact(tmp_path: Path, starting_model: Path) -> None:
    """Two ranks, a cut and a change by a person; the wait for the thread is a phase."""
    flags = ("--local.learner_ranks=2", "--learner.proximal.deadline_s=600", "--learner.publishing=background")
    run, home = interrupted(tmp_path, starting_model, *flags, ENDLESS)
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="the second version")
        with closing(ControlClient(url_in(home, "learner"))) as learner:
            cut = send(learner, "POST", "/v1/actions/cut")
            changed = send(learner, "PATCH", "/v1/settings", {LR: FASTER})
        last = end_after_two_versions(run, home)
    except BaseException:
        run.kill_everything()  # it would train for ever
        raise
    code, output = run.finish()
    assert code == 0, output[-3000:]
    check_whole_groups(check_ledger(home), groups=last * 4, samples=4)
    announced = set()
    for record in records(home, CONTROL):
        if isinstance(record, VersionPublished):
            announced.add(record.version)
        elif isinstance(record, ControlChanged):
            assert record.version in announced
    lines = history(home)
    assert cut["version"] <= changed["version"] < last
    assert [line["learning_rate"] for line in lines] == [
        SLOWER if line["version"] < changed["version"] else FASTER for line in lines
    ]
    assert sum("publish_wait" in line["phases"] for line in lines) > 0
    assert all("checkpoint" not in line["phases"] for line in lines)
    assert all(line["exact"] for line in lines)
    assert missing(home) == 0
    assert check_scores(home, starting_model)["tokens"] > 500


def test_a_run_survives_a_worker_that_dies_in_the_middle_of_a_cut(tmp_path: Path, starting_model: Path) -> None:
    """One failpoint with real processes; test_learner_schedules.py tests all, silent workers and stopped learners."""
    environment = {"PALIMPSEST_FAULT": "rollout.at_cut:2", "PALIMPSEST_FAULT_ONCE": str(tmp_path / "died")}
    run, home = interrupted(tmp_path, starting_model, environment=environment)
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    assert (tmp_path / "died").exists()
    ledger = check_ledger(home)
    # trajectories that went stale during the restart, and the rest of their groups
    assert set(ledger["dropped"]) <= {"over_staleness", "group_too_small"}
    assert ledger["trained"] + sum(ledger["dropped"].values()) >= VERSIONS * 16
    assert all(line["exact"] for line in history(home))
    check_scores(home, starting_model)
