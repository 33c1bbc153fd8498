"""A real model on the vLLM engine with two sharded ranks: it trains, publishes, and continues on one rank."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_real_model import SAMPLES, SHORTER, VERSIONS
from tests.integration.test_sharded_run import KEPT, lines_of
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import RunProcess, check_ledger, history, newest_manifest
from tools import real_model

pytestmark = [pytest.mark.vllm, pytest.mark.long]


def test_a_real_model_continues_on_one_rank(tmp_path: Path) -> None:
    home = tmp_path / "real"
    keys = (
        "examples/real_model.toml", f"--run.folder={tmp_path}", "--run.id=real",
        f"--model.path={real_model.cached(print)}", f"--learner.checkpoint.every={VERSIONS + 1}", *KEPT, *SHORTER,
    )  # fmt: skip
    code, output = RunProcess(*keys, "--local.learner_ranks=2").finish(within_s=4 * LIMIT_S)
    assert code == 0, output[-3000:]
    assert ranks_of(home) == {"0", "1"}
    code, output = RunProcess(*keys, "--resume", home, f"--learner.versions={VERSIONS + 1}").finish(
        within_s=4 * LIMIT_S
    )
    assert code == 0, output[-3000:]
    assert ranks_of(home) == {"0"}
    check_ledger(home, samples=SAMPLES, max_staleness=0)
    lines = history(home)
    assert len(lines) == VERSIONS + 1
    assert all(line["exact"] and line["skipped"] == 0 for line in lines)
    compared = json.loads(lines_of("rescore", str(home))[-1])
    assert compared["versions"] >= VERSIONS
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0


def ranks_of(home: Path) -> set[str]:
    """The ranks that wrote the shards of the newest checkpoint."""
    return {name.split("_")[2] for name in newest_manifest(home)["shards"] if name.startswith("__")}
