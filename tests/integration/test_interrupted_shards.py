"""Runs with cuts on sharded ranks, of which one is killed, and which continue on more ranks: every token is exact."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.control_client import ControlClient, url_in
from tests.integration.test_lora_run import LORA
from tests.integration.test_sharded_run import KEPT, PACKED, lines_of
from tests.runs.endless import ENDLESS, send, several_versions
from tests.runs.run_process import (
    RunProcess,
    check_ledger,
    check_whole_groups,
    history,
    newest_manifest,
    scripted,
    wait_for,
)

pytestmark = [pytest.mark.servers, pytest.mark.long]
CRITIC = ("--learner.advantages.kind=gae",)
SHARED_ROWS = ("--learner.context_parallel=2", *PACKED)
ADAPTER = (*LORA, "--learner.publishing=background")
KEYS = (*KEPT, "--learner.proximal.kind=interruption", "--learner.proximal.deadline_s=600")
ROUNDING, LARGEST = 0.01, 0.2
"""Nats. Mean and largest effect of a layout, shared rows included, on a log-prob of the small bf16 model."""


@pytest.mark.parametrize(
    "flags",
    [CRITIC, SHARED_ROWS, ADAPTER, (*SHARED_ROWS, *CRITIC), (*SHARED_ROWS, *ADAPTER)],
    ids=["critic", "shared rows", "adapter", "shared rows with a critic", "shared rows with an adapter"],
)
def test_a_run_is_cut_loses_a_rank_and_continues_on_four_ranks(
    flags: tuple[str, ...], tmp_path: Path, starting_model: Path
) -> None:
    adapted, shares = set(ADAPTER) <= set(flags), set(SHARED_ROWS) <= set(flags)
    toml, home = scripted(tmp_path, starting_model, versions=1, tokens_per_s=25.0), tmp_path / "scripted"
    run = RunProcess(toml, "--local.learner_ranks=2", *KEYS, *flags, ENDLESS)
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="version 2")
        with closing(ControlClient(url_in(home, "learner"))) as learner:
            cut = send(learner, "POST", "/v1/actions/cut")
        assert (cut["result"]["workers"], cut["result"]["late"]) == (["worker-0"], [])
        wait_for(lambda: several_versions(home), run, name="a trajectory of several versions")
        learners, before = run.services()["learner"], len(history(home))
        assert len(learners) == 2
        learners[-1].kill()
        wait_for(lambda: len(history(home)) > before + 1, run, name="two versions after the death of a rank")
        run.process.terminate()
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 130, output[-3000:]
    assert ranks_of(home) == (set() if adapted else {"0", "1"})

    last = len(history(home)) + 2
    more = ("--resume", home, "--local.learner_ranks=4", f"--learner.versions={last}")
    code, output = RunProcess(toml, *more, *KEYS, *flags).finish()
    assert code == 0, output[-3000:]
    assert ranks_of(home) == (set() if adapted else {"0", "1", "2", "3"})
    check_whole_groups(check_ledger(home), groups=last * 4, samples=4)
    lines = history(home)
    assert len(lines) == last
    assert all(line["exact"] and line["skipped"] == 0 for line in lines)
    compared = json.loads(lines_of("rescore", str(home))[-1])
    assert compared["alone_mean_abs"] < ROUNDING
    assert compared["alone_max_abs"] < LARGEST
    assert compared["versions"] > 3
    assert compared["same_layout_unequal"] == 0
    assert (compared["same_layout_tokens"] > 0) != shares, "one process has no layout of shared rows"


def ranks_of(home: Path) -> set[str]:
    """The ranks that wrote shards of the newest checkpoint: none for an adapter, which rank 0 has."""
    return {name.split("_")[2] for name in newest_manifest(home)["shards"] if name.startswith("__")}
