"""Import contracts, and programs that must start without heavy libraries."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "examples" / "embedded.toml")
HEAVY = ("torch", "vllm", "transformers")
LOADED = "import json, sys; print(json.dumps([name for name in sys.modules if '.' not in name]), file=sys.stderr)"


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after it ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept
    assert int(kept[1]) >= 2


LIGHT = (
    "palimpsest.common.config",
    "palimpsest.common.messages",
    "palimpsest.common.bus.factory",
    "palimpsest.common.snapshots.client",
    "palimpsest.common.sessions.client",
    "palimpsest.services.snapshot_store.__main__",
    "palimpsest.services.env_gateway.__main__",
    "palimpsest.services.learner.__main__",
    "palimpsest.services.learner.replica.__main__",
    "palimpsest.services.learner.dead_letters.command",
    "palimpsest.services.rollout.__main__",
    "palimpsest.services.audit.command",
    "palimpsest.export.export",
    "palimpsest.rescore_command",
    "palimpsest.run",
    "palimpsest.cli",
)
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "vllm", "transformers"} & set(sys.modules)
    assert not heavy, f"{name} loads {heavy}"
"""


def test_programs_are_imported_without_heavy_libraries() -> None:
    assert loaded_after(IMPORTS, *LIGHT) >= {"palimpsest"}


def test_the_import_check_detects_a_heavy_library() -> None:
    with pytest.raises(AssertionError, match=r"wave loads \{'torch'\}"):
        loaded_after("import sys; sys.modules['torch'] = sys\n" + IMPORTS, "wave")


@pytest.mark.parametrize("service", ["learner", "rollout"])
def test_checking_a_run_loads_no_heavy_library(service: str) -> None:
    """So `--check` takes one or two seconds."""
    code = f"import runpy\nrunpy.run_module('palimpsest.services.{service}', run_name='__main__')"
    assert loaded_after(code, RUN, "--check").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("sqlite3", {"common/bus/sqlite.py", "common/bus/sqlite_damage.py"}),
        (
            "vllm",
            {
                f"services/rollout/engine/{name}.py"
                for name in ("vllm", "vllm_lora", "vllm_weight_transfer", "weight_update")
            }
            | {"palimpsest/doctor/gpu_checks.py"},
        ),
        (
            "torch.distributed",
            {"services/learner/distributed.py", "services/learner/torchrun.py"}
            | {f"services/learner/restarts/{name}.py" for name in ("agent", "launch")}
            | {
                f"services/learner/sharding/{name}.py"
                for name in (
                    "build",
                    "load",
                    "local_shards",
                    "part_messages",
                    "pass_errors",
                    "shard_files",
                    "sharded_model",
                    "sharded_policy",
                )
            }
            | {"palimpsest/doctor/gpu_checks.py"},
        ),
        ("uvicorn", {"common/service.py", "common/control/connections.py"}),
        ("zstandard", {"common/bus/kafka/batches.py", "common/snapshots/codec.py"}),
        (
            "minio",
            {
                "services/snapshot_store/storage_minio.py",
                "services/snapshot_store/s3_client.py",
                "palimpsest/rescore.py",
            },
        ),
    ],
)
def test_only_the_listed_files_import_the_library(library: str, homes: set[str]) -> None:
    lines = (f"import {library}", f"from {library}")
    found = {
        str(path.relative_to(ROOT))
        for top in ("palimpsest", "common", "services")
        for path in (ROOT / top).rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(tuple(f"{start}{end}" for start in lines for end in (" ", ".")))
        or line.strip() in lines
    }
    assert found <= homes
