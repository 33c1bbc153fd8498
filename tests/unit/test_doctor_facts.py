"""`palimpsest doctor`: the facts of a machine, and the folder and ports of a run."""

import sys
from pathlib import Path

import pytest

from palimpsest.doctor import gather, machine, run_file

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


def test_folder_and_ports_come_from_file_environment_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[run]\nfolder = "here"\nid = "a"\n[env_gateway]\nport = 7701\n[snapshot_store]\nport = 0\n')
    words = [str(file), "--check", "--run.id", "b", "--rollout.port=7703"]
    values = run_file.named(words, {"PALIMPSEST_RUN__FOLDER": "there", "PALIMPSEST_LEARNER__PORT": "7704"})
    assert run_file.folder(values) == Path("there/b")
    assert run_file.ports(values) == [
        ("env_gateway.port", "127.0.0.1", 7701),
        ("learner.port", "127.0.0.1", 7704),
        ("rollout.port", "127.0.0.1", 7703),
    ]


def test_a_resumed_run_is_read_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[learner]\nhost = "localhost"\nport = 7704\n[rollout]\nhost = "a"\nport = 1\n')
    values = run_file.named([f"--resume={tmp_path}"], {})
    assert run_file.folder(values) == tmp_path
    assert run_file.ports(values) == [("learner.port", "127.0.0.1", 7704)]  # `a` is a host name, which is not resolved


@pytest.mark.parametrize("text", [None, "no = [toml", "\udcff"])
def test_an_unreadable_run_file_is_ignored(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    assert run_file.named([str(file)], {}) == {}


def test_the_facts_of_this_machine_are_plausible() -> None:
    facts = gather.facts(ROOT, "cpu")
    assert facts.python.version == sys.version_info[:3]
    assert facts.cpus > 0
    assert 0 < facts.memory_free <= facts.memory
    assert facts.amx in {"absent", "permitted", "refused"}
    assert (facts.amx == "absent") == ("amx_tile" not in facts.cpu_flags)


def test_a_missing_folder_is_checked_by_its_nearest_existing_parent(tmp_path: Path) -> None:
    found = gather.place(tmp_path / "runs" / "a")
    assert found.writable
    assert found.free > 0
    assert found.owner == ""
    (tmp_path / "file").write_text("")
    assert not gather.place(tmp_path / "file" / "a").writable


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000000000", "memory.current": "400000000", "memory.stat": "inactive_file 100000000"}, 7),
        ({"memory.max": "max", "memory.current": "400000000"}, None),
        ({"memory.limit_in_bytes": "1000000000", "memory.usage_in_bytes": "300000000"}, 7),
        ({"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "300000000"}, None),
    ],
    ids=["cgroup v2", "cgroup v2 without a limit", "cgroup v1", "cgroup v1 without a limit"],
)
def test_memory_is_limited_by_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    there = {name: str(tmp_path / name) for name in files}
    monkeypatch.setattr(machine, "group", lambda _, name: there.get(name, ""))
    whole, free, by = machine.memory()
    if expected is None:
        assert by == "the machine"
    else:
        assert (whole, free, by) == (GB, expected * 10**8, "the control group")
