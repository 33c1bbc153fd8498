"""Sharded learners of two ranks that die at every failpoint, one after another: the last one ends an exact run.

test_learner_schedules.py does so in simulated time with one rank that holds a table.
"""

import json
from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.files import write
from tests.integration.test_sharded_run import KEPT, lines_of
from tests.runs.endless import ENDLESS
from tests.runs.run_process import check_ledger, check_whole_groups, history, scripted
from tests.runs.unsupervised import KEEP_ALL, WITHIN_S, Services
from tests.simulation.learner_faults import places

pytestmark = [pytest.mark.servers, pytest.mark.long]
LEARNERS = [name for name in places() if name.startswith("learner.") and not name.startswith("learner.evaluation")]
KILLED = 128 + 9
ROUNDING = 5e-3
"""Nats. Largest effect of padding on a log-prob of the small bf16 model."""


def test_a_run_continues_after_the_death_of_a_rank_at_every_failpoint(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1, tokens_per_s=25.0), tmp_path / "scripted"
    flags = (*KEPT, KEEP_ALL, "--learner.proximal.kind=interruption", "--learner.proximal.deadline_s=600")
    services = Services(toml, home, *flags)
    write(home / "run.toml", to_toml(load([str(toml), *flags], {}, program="").config).encode())
    try:
        for name in ("snapshot_store", "env_gateway"):
            services.start(name, name)
        services.start("worker-0", "rollout", f"--rollout.port={services.ports['rollout']}")
        for place in LEARNERS:  # the second visit is after the first version, or in it
            services.ranks("learner", 2, ENDLESS, fault=f"{place}:2")
            assert services.forget("learner") == KILLED, (place, services.log("learner").read_text()[-3000:])
        last = len(history(home)) + 2
        learner = services.ranks("learner", 2, f"--learner.versions={last}")
        assert learner.wait(timeout=WITHIN_S) == 0, services.log("learner").read_text()[-3000:]
        assert services.forget("worker-0") == 0
    finally:
        services.end()
    check_whole_groups(check_ledger(home), groups=last * 4, samples=4)
    lines = history(home)
    assert [line["version"] for line in lines] == sorted({line["version"] for line in lines})
    assert len(lines) == last
    assert all(line["exact"] and line["skipped"] == 0 for line in lines)
    verified = lines_of("store", "verify", str(home))
    assert verified
    assert all(line.endswith(": every digest is right") for line in verified)
    compared = json.loads(lines_of("rescore", str(home))[-1])
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0
    assert compared["alone_max_abs"] <= ROUNDING
