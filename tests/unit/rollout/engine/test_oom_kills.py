"""Where the kernel counts out-of-memory kills, with the files of hosts and containers of cgroup versions 1 and 2."""

from pathlib import Path

import pytest

from palimpsest.services.rollout.engine.oom_kills import candidate_paths, find_counter, parse_count, read_count

V2_HOST = (
    "0::/user.slice/user-1000.slice/session-3.scope\n",
    "28 24 0:25 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
)
V2_CONTAINER = (
    "0::/\n",
    """612 611 0:26 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
623 620 0:25 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate
""",
)
V1_HOST = (
    "12:cpuset:/\n5:memory:/jobs/train\n4:cpu,cpuacct:/\n1:name=systemd:/init.scope\n0::/init.scope\n",
    """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 - cgroup2 cgroup2 rw
""",
)
V1_CONTAINER = (
    "11:cpu,cpuacct:/docker/4f1d\n9:memory:/docker/4f1d\n1:name=systemd:/docker/4f1d\n",
    "743 738 0:32 /docker/4f1d /sys/fs/cgroup/memory ro,nosuid,relatime master:15 - cgroup cgroup rw,memory\n",
)
V1_POD = (
    "9:memory:/kubepods/pod7/c3\n",
    "743 738 0:32 /../.. /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n",
)
EVENTS = "low 0\nhigh 0\nmax 2154\noom 3\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
VMSTAT = "nr_free_pages 104321\noom_kill {}\ncompact_stall 0\n"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (
            V2_HOST,
            ["/sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope/memory.events", "/sys/fs/cgroup/memory.events"],
        ),
        (V2_CONTAINER, ["/sys/fs/cgroup/memory.events"]),
        (
            V1_HOST,
            [
                "/sys/fs/cgroup/memory/jobs/train/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
                "/sys/fs/cgroup/unified/init.scope/memory.events",
                "/sys/fs/cgroup/unified/memory.events",
            ],
        ),
        (V1_CONTAINER, ["/sys/fs/cgroup/memory/memory.oom_control"]),
        (
            V1_POD,
            [
                "/sys/fs/cgroup/memory/kubepods/pod7/c3/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
            ],
        ),
        (("", ""), []),
        (("0::/\n", ""), []),
    ],
)
def test_the_processs_own_cgroup_comes_first(texts: tuple[str, str], expected: list[str]) -> None:
    assert list(map(str, candidate_paths(*texts))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EVENTS.format(4), 4),
        (CONTROL.format(2), 2),
        (VMSTAT.format(0), 0),
        ("oom_kill_disable 1\nunder_oom 0\n", None),  # cgroup version 1 before Linux 4.13
        ("oom 7\noom_group_kill 1\n", None),
        ("", None),
    ],
)
def test_only_the_count_of_killed_processes_is_read(text: str, expected: int | None) -> None:
    assert parse_count(text) == expected


def machine(folder: Path, *, cgroup: str, point: str) -> Path:
    """Make a /proc whose process is in this cgroup; the cgroup file system is mounted at the folder `point`."""
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(cgroup)
    kind, options = ("cgroup2", "rw") if cgroup.startswith("0::") else ("cgroup", "rw,memory")
    (proc / "self/mountinfo").write_text(f"31 23 0:28 / {folder / point} rw - {kind} cgroup {options}\n")
    (proc / "vmstat").write_text(VMSTAT.format(90))
    return proc


@pytest.mark.parametrize(
    ("cgroup", "name", "text"),
    [("0::/jobs/7\n", "memory.events", EVENTS), ("4:memory:/jobs/7\n", "memory.oom_control", CONTROL)],
)
def test_kills_outside_the_cgroup_are_not_counted(tmp_path: Path, cgroup: str, name: str, text: str) -> None:
    proc = machine(tmp_path, cgroup=cgroup, point="fs")
    own = tmp_path / "fs/jobs/7" / name
    own.parent.mkdir(parents=True)
    own.write_text(text.format(1))
    (tmp_path / "fs" / name).write_text(text.format(50))  # the parent cgroup, which has other processes
    found = find_counter(proc)
    assert (found, read_count(found)) == (own, 1)
    own.write_text(text.format(2))
    assert read_count(found) == 2


def test_without_a_cgroup_counter_the_machines_counter_is_read(tmp_path: Path) -> None:
    proc = machine(tmp_path, cgroup="0::/jobs/7\n", point="fs")
    assert read_count(find_counter(proc)) == 90
    (proc / "vmstat").write_text("nr_free_pages 1\n")
    assert find_counter(proc) is None
    assert read_count(None) == 0


def test_a_kernel_without_counters_gives_no_count(tmp_path: Path) -> None:
    assert find_counter(tmp_path) is None


def test_the_count_of_this_machine_is_readable() -> None:
    assert read_count(find_counter()) >= 0
