"""`palimpsest plan`: processes that share the learner's GPU."""

import json
from pathlib import Path

from palimpsest.plan.command import run_command
from tests.runs.run_process import scripted


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
