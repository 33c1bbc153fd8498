"""`palimpsest plan`: processes that share the learner's GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from palimpsest.plan.command import run_command
from tests.runs.run_process import scripted

BY_TURNS = ("--rollout.engine.kind=vllm", "--rollout.engine.sleep=true", "--learner.proximal.kind=interruption")


def plan_by_turns(run: Path, gpus: str, *keys: str) -> tuple[dict[str, Any], str]:
    """The plan of four ranks, as JSON and as text."""
    words = [str(run), f"--gpus={gpus}", *BY_TURNS, "--local.learner_ranks=4", *keys]
    return json.loads(run_command([*words, "--json"])[0]), run_command(words)[0]


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(("workers", "width"), [(4, 1), (2, 2)])
def test_ranks_and_engines_by_turns_need_the_gpus_once(run_file: Path, workers: int, width: int, sharding: str) -> None:
    engines = (f"--local.rollout_workers={workers}", f"--rollout.engine.tensor_parallel={width}")
    plan, text = plan_by_turns(run_file, "4x80", *engines, f"--learner.sharding={sharding}")
    assert plan["fits"]
    assert plan["gpus"] == {"number": 4, "usable_bytes": (80 - 1 - 1) * 2**30, "needed": 4}
    assert "the run needs 4 (4 for engines, 4 for the learner, by turns on the same ones)\n" in text
    assert plan["engine"]["asleep_host_bytes"] == 4 * plan["engine"]["weights_bytes"] > 0
    assert "in the host's memory, of all that sleep" in text


def test_what_a_rank_holds_all_the_time_must_fit_beside_the_engine_on_its_gpu(run_file: Path) -> None:
    utilization = "--rollout.engine.gpu_memory_utilization=0.9"
    plan, _ = plan_by_turns(run_file, "4x1.0625", "--local.rollout_workers=1", utilization)
    assert any("what a rank of the learner holds all the time needs" in text for text in plan["misfits"])
    keys = '--local.gpus={"engines" = [4], "learner" = [0, 1, 2, 3]}'
    apart, text = plan_by_turns(run_file, "5x80", "--local.rollout_workers=1", keys)
    assert apart["fits"]
    assert (apart["gpus"]["needed"], apart["gpus"]["usable_bytes"]) == (5, 79 * 2**30)
    assert "by turns" not in text


def test_a_replica_on_the_learners_gpu_takes_room(tmp_path: Path, starting_model: Path) -> None:
    run = scripted(tmp_path, starting_model, versions=1)
    words = [str(run), "--gpus=2x80", "--learner.proximal.kind=replica", "--json"]
    rooms = []
    for gpu in (0, 1):
        keys = f'--local.gpus={{"engines" = [], "learner" = [1], "replicas" = [{gpu}]}}'
        plan = json.loads(run_command([*words, keys])[0])
        assert plan["fits"]
        rooms.append(plan["gpus"]["usable_bytes"])
    apart, beside = rooms
    assert apart == 79 * 2**30
    assert apart - beside > 2**30 + plan["model"]["bytes"], "CUDA, weights, and the tensors of a scoring pass"
