"""A run with evaluations and the scripted engine, and `palimpsest eval` on what it stored."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.evaluation.lines import evaluation_lines
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.messages import TRAJECTORIES, decode
from palimpsest.eval_command import parse, run as evaluate
from palimpsest.services.audit.command import run_command
from tests.runs.run_process import RunProcess, check_ledger, history, scripted

pytestmark = pytest.mark.servers
VERSIONS = 6
ENVIRONMENTS = ("lookup", "hop", "add")


@dataclass(frozen=True)
class Evaluated:
    """A finished run."""

    home: Path
    output: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its evaluations."""
        return evaluation_lines(self.home)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Evaluated:
    folder = tmp_path_factory.mktemp("runs")
    names = ", ".join(f'"{name}"' for name in ENVIRONMENTS)
    process = RunProcess(
        scripted(folder, starting_model, versions=VERSIONS),
        "--evaluation.every=2",
        f"--evaluation.environments=[{names}]",
        "--evaluation.tasks=5",
        "--evaluation.samples=3",
        "--learner.checkpoint.keep=1000",
    )
    code, output = process.finish()
    assert code == 0, output[-4000:]
    return Evaluated(folder / "scripted", output)


def test_every_second_version_and_the_last_are_evaluated(evaluated: Evaluated) -> None:
    assert [line["trained_versions"] for line in evaluated.lines] == [0, 2, 4, 6]
    for line in evaluated.lines:
        assert line["trajectories"] == {"offered": 45, "scored": 45, "dropped": {}, "dead_lettered": 0, "pending": 0}
        assert set(line["evaluation"]) == set(ENVIRONMENTS)


def test_nothing_of_it_is_trained_on_and_the_audit_accounts_for_it(evaluated: Evaluated) -> None:
    check_ledger(evaluated.home, samples=4, max_staleness=3)
    report = json.loads(run_command([str(evaluated.home), "--json"], {}).text)
    assert report["evaluations"] == {
        "offered": 180, "scored": 180, "dropped": {}, "dead_lettered": 0, "unscored": 0,
    }  # fmt: skip
    assert not any(is_evaluation(group) for line in history(evaluated.home) for group in line["groups"])


def test_exactly_the_stated_version_sampled_every_token(evaluated: Evaluated) -> None:
    bus = SqliteBus(evaluated.home / "bus.sqlite")
    with bus.consumer(TRAJECTORIES) as consumer:
        messages = [decode(TRAJECTORIES, record.body) for record in consumer.poll(limit=10_000, timeout_s=0)]
    bus.close()
    seen = {(m.group.split("-")[0], s.version) for m in messages if is_evaluation(m.group) for s in m.segments}
    assert seen == {(f"e{line['version']:06d}", line["version"]) for line in evaluated.lines}


def test_the_best_version_stays_in_the_store(evaluated: Evaluated) -> None:
    pins = json.loads((evaluated.home / "snapshots" / "pins.json").read_bytes())
    assert pins == {str(evaluated.lines[-1]["best"]): {"best": None}}


def test_summary_and_report_have_the_results(evaluated: Evaluated) -> None:
    summary = json.loads((evaluated.home / "summary.json").read_text())
    assert summary["evaluations"] == evaluated.lines
    assert summary["best_version"] == evaluated.lines[-1]["best"]
    assert "Held-out tasks" in (evaluated.home / "report.html").read_text()


@pytest.mark.parametrize("place", [1, -1])
def test_palimpsest_eval_gives_the_result_of_the_run_again(evaluated: Evaluated, place: int) -> None:
    """The scripted engine answers a trajectory of the same id in the same way."""
    line = evaluated.lines[place]
    again = evaluate(parse([str(evaluated.home), "--version", str(line["version"])]), {})
    assert again["evaluation"] == line["evaluation"]
    assert (again["trajectories"], again["version"]) == (line["trajectories"], line["version"])


def test_other_tasks_are_sampled_with_another_seed(evaluated: Evaluated) -> None:
    found = evaluate(parse([str(evaluated.home), "--seed=1000", "--tasks=2", "--environments=hop"]), {})
    assert set(found["evaluation"]) == {"hop"}
    assert found["evaluation"]["hop"]["samples"] == 6


@pytest.mark.parametrize(("environment", "name"), [("lookup", "helper"), ("words", "helper.test")])
def test_an_agent_program_is_evaluated(evaluated: Evaluated, environment: str, name: str) -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "agents" / "tool_agent.py")]
    agents = f'{{"helper" = {{"command" = {json.dumps(command)}, "environment" = "{environment}", "max_calls" = 40}}}}'
    words = [str(evaluated.home), f"--environments={name}", "--tasks=2", "--samples=1", f"--rollout.agents={agents}"]
    words.append('--env_gateway.plugins={"words" = "tests.runs.split_words:Words"}')
    found = evaluate(parse(words), {})
    assert found["trajectories"]["scored"] == 2
    assert found["evaluation"][name]["samples"] == 2
