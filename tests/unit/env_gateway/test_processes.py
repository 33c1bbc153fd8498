"""Environments in child processes: their failures stay in their session."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from palimpsest.common.environments.port import EnvironmentFailed, Reply, Score, Turn
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.sessions.hosts import AtCapacity
from palimpsest.common.sessions.registry import Entry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step, TakeStep, TextAction
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway import plugins
from palimpsest.services.env_gateway.processes import child_host, fork_server
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec
from tests.processes.waiting import LIMIT_S

pytestmark = pytest.mark.servers
FOLDER = Path(__file__).parent / "plugins"
HANGS_S = 2.0
"""Limit of a call that never returns."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(child_host, "EXIT_LIMIT_S", LIMIT_S)
    pool = Pool(limit=3, wait_s=0.2, call_limit_s=LIMIT_S, modules=("awkward",))
    yield pool
    pool.stop()


@pytest.fixture
async def opened(pool: Pool) -> AsyncIterator["Opened"]:
    opened = Opened(pool)
    yield opened
    await pool.close()


class Opened:
    """Opens hosts of the environments in plugins/awkward.py and resets them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.worlds: list[InChild] = []

    async def __call__(self, name: str, seed: int = 0) -> InChild:
        world = await InChild.open(self.pool, EnvironmentSpec(path=f"awkward:{name}"))
        self.worlds.append(world)
        await world.reset(seed)
        return world


def fork_servers() -> list[psutil.Process]:
    """Fork servers of this process; other tests leave other children, such as multiprocessing's resource tracker."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ends now, or has ended
            if fork_server.__name__ in child.cmdline():
                found.append(child)
    return found


def children() -> list[psutil.Process]:
    """Fork servers, their children, and processes started by those."""
    return [process for each in fork_servers() for process in (each, *each.children(recursive=True))]


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until these processes have ended."""
    assert psutil.wait_procs(processes, timeout=LIMIT_S)[1] == []


async def test_a_child_plays_a_session(opened: Opened) -> None:
    world = await InChild.open(opened.pool, EnvironmentSpec(path="awkward:Counts"))
    opened.worlds.append(world)
    opening, state_hash = await world.reset(5)
    assert opening.messages[0].content == "task 5"
    assert len(state_hash) == 32
    for number in (1, 2):
        reply = await world.step(Turn("go on"))
        assert isinstance(reply, Reply)
        assert reply.messages[0].content == f"turn {number}"
    assert await world.step(Turn("end")) == Score(0.5, True, {"turns": 3.0})
    assert await world.finalize() == Score(0.25, False, {})


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("Raises", "environment_raised", "LookupError: no such turn"),
        ("LeavesPython", "environment_raised", "SystemExit: 0"),
        ("Hangs", "environment_timeout", "no answer to step in 2 s"),
        ("HangsInC", "environment_timeout", "no answer to step in 2 s"),
        ("Exits", "environment_crashed", "its process ended with exit code 3"),
        ("Segfaults", "environment_crashed", "its process was killed by SIGSEGV"),
        ("NotANumber", "environment_invalid", "reward is nan, not a number in [0, 1]"),
        ("TooMuch", "environment_invalid", "reward is 1.5, not a number in [0, 1]"),
        ("ReturnsNone", "environment_invalid", "None is neither a Reply nor a Score"),
        ("Forges", "environment_invalid", "reward is 7.0, not a number in [0, 1]"),
        ("Floods", "environment_invalid", "it sent more than 16777216 bytes"),
    ],
)
async def test_every_fault_of_a_child_is_a_named_failure(opened: Opened, name: str, code: str, message: str) -> None:
    world = await opened(name)
    if code == "environment_timeout":
        world._call_limit_s = HANGS_S
    with pytest.raises(EnvironmentFailed) as failed:
        await world.step(Turn("go on"))
    assert (failed.value.code, str(failed.value)) == (code, message)


async def test_a_class_that_cannot_be_loaded_fails_its_session(pool: Pool) -> None:
    world = await InChild.open(pool, EnvironmentSpec(path="awkward:Absent"))
    with pytest.raises(EnvironmentFailed, match=r"AttributeError: .*Absent"):
        await world.reset(0)
    world.close()


async def test_the_number_of_children_is_bounded_and_a_closed_one_frees_a_slot(opened: Opened) -> None:
    first, *_ = [await opened("Counts") for _ in range(3)]
    with pytest.raises(AtCapacity, match="3 sessions already have their own process"):
        await opened("Counts")
    opened.pool._wait_s = LIMIT_S  # a place is free when the pool has read the end of its child
    first.close()
    await opened("Counts")


async def test_closing_kills_a_hanging_child_and_its_descendants(opened: Opened) -> None:
    starter, hanging = await opened("StartsOthers"), await opened("HangsInC")
    reply = await starter.step(Turn("go on"))
    assert isinstance(reply, Reply)
    grandchild = psutil.Process(int(reply.messages[0].content))
    step = asyncio.create_task(hanging.step(Turn("go on")))
    running = [process for process in children() if process.ppid() != os.getpid()]
    assert grandchild in running
    starter.close()
    hanging.close()
    with pytest.raises(EnvironmentFailed):
        await step
    assert len(running) == 3
    assert_gone(running)


async def test_closing_the_pool_ends_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(children())
    pool = Pool(limit=3, wait_s=0.2, call_limit_s=LIMIT_S, modules=("awkward",))
    world = await InChild.open(pool, EnvironmentSpec(path="awkward:StartsOthers"))
    await world.reset(0)
    await world.step(Turn("go on"))
    started = [process for process in children() if process not in before]
    assert len(started) == 3
    await pool.close()
    assert_gone(started)


async def test_a_killed_fork_server_fails_its_sessions_and_is_replaced(opened: Opened) -> None:
    world = await opened("Counts")
    (running,) = fork_servers()
    (child,) = running.children()
    running.kill()
    child.wait(LIMIT_S)
    with pytest.raises(EnvironmentFailed) as failed:
        await world.step(Turn("go on"))
    assert failed.value.code == "environment_crashed"
    assert isinstance(await (await opened("Counts")).step(Turn("go on")), Reply)


async def test_global_random_numbers_depend_only_on_the_seed_in_every_gateway(pool: Pool) -> None:
    async def drawn(pool: Pool, *seeds: int) -> list[list[str]]:
        """Return the draws of concurrent sessions from the global generator and from a set."""
        worlds = [await InChild.open(pool, EnvironmentSpec(path="awkward:UsesGlobalChance")) for _ in seeds]
        for world, seed in zip(worlds, seeds, strict=True):
            await world.reset(seed)
        replies = [await world.step(Turn("go on")) for world in reversed(worlds)][::-1]
        for world in worlds:
            world.close()
        return [reply.messages[0].content.split() for reply in replies if isinstance(reply, Reply)]

    other = Pool(limit=3, wait_s=LIMIT_S, call_limit_s=LIMIT_S)
    one, two = await drawn(pool, 1, 2)
    assert await drawn(other, 2) == [two]
    assert await drawn(other, 1) == [one]
    assert one[0] != two[0]
    await pool.close()
    await other.close()


async def test_sessions_over_children_end_as_errors_without_a_reward(pool: Pool) -> None:
    worlds: list[InChild] = []

    async def open_world() -> InChild:
        worlds.append(await InChild.open(pool, EnvironmentSpec(path="awkward:Hangs")))
        return worlds[-1]

    entry = Entry("hangs", "1", "", True, open_world)
    sessions = Sessions({"hangs": entry}, SessionLimits(max_sessions=9, lease_s=60, remember_s=60, result_bytes=1000))
    opened = await sessions.create(CreateSession(environment="hangs", seed=0), None)
    session = Session.model_validate_json(opened).session_id
    worlds[0]._call_limit_s = HANGS_S
    child = next(p for p in children() if p.ppid() != os.getpid())
    ended = Step.model_validate_json(
        await sessions.step(session, TakeStep(step=0, action=TextAction(type="text", text="")))
    )
    assert (ended.status, ended.reward) == (Status.ERROR, None)
    assert ended.error is not None
    assert ended.error.code == "environment_timeout"
    assert_gone([child])


async def test_a_creation_cancelled_at_any_point_leaves_no_child_and_no_occupied_slot(opened: Opened) -> None:
    await opened("Counts")
    (running,) = fork_servers()
    (first,) = running.children()
    for turns_of_the_loop in range(12):
        opening = asyncio.create_task(InChild.open(opened.pool, EnvironmentSpec(path="awkward:Counts")))
        for _ in range(turns_of_the_loop):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert_gone([child for child in running.children() if child.pid != first.pid])
    while len(opened.pool._children) > 1:  # a place is free when the pool has read the end of its child
        await asyncio.sleep(0.01)
    await opened("Counts")
    await opened("Counts")
    assert len(running.children()) == 3
    with pytest.raises(AtCapacity):
        await opened("Counts")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("absent_module:Class", "ModuleNotFoundError: No module named 'absent_module'"),
        ("awkward:Absent", "AttributeError: module 'awkward' has no attribute 'Absent'"),
        ("awkward:not_a_class", "it is not a class"),
        ("awkward:NoFinalize", r"it has no finalize\(\), state_hash\(\)"),
        ("awkward:NoVersion", "its `version` is not a text"),
        ("broken:Class", "RuntimeError: the data is missing"),
        ("leaves:Class", "its import ended the process"),
    ],
)
def test_an_unusable_plugin_is_refused_with_the_reason(pool: Pool, path: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"env_gateway.plugins.mine: {path} cannot be used: {problem}"):
        plugins.entries(pool, plugins.blueprints({"mine": path}, taken=()))


def test_a_usable_plugin_is_offered(pool: Pool) -> None:
    found = plugins.entries(pool, plugins.blueprints({"mine": "awkward:Counts"}, taken=()))
    entry = found["mine"]
    assert (entry.version, entry.description, entry.isolated) == (
        "3", "Counts its turns and ends on request.", True,
    )  # fmt: skip


def test_a_module_that_fails_to_preload_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    pool = Pool(limit=1, wait_s=0.2, call_limit_s=LIMIT_S, modules=("broken", "absent_module"))
    try:
        assert pool.describe(EnvironmentSpec(path="awkward:Counts")).version == "3"
    finally:
        pool.stop()


async def test_the_splits_of_a_plugin_are_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(4)))
    code = (
        f"from palimpsest.env import from_dataset\nRows = from_dataset({str(tmp_path / 'rows.jsonl')!r}, held_out=0.5,"
    )
    (tmp_path / "split_rows.py").write_text(f"{code} reward=lambda row, answer: answer == row['prompt'])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = Pool(limit=2, wait_s=LIMIT_S, call_limit_s=LIMIT_S)
    try:
        found = plugins.entries(pool, plugins.blueprints({"rows": "split_rows:Rows"}, taken=()))
        assert set(found) == {"rows", "rows.test"}
        prompts = set()
        for entry in found.values():
            host = await entry.open()
            opening, _ = await host.reset(0)
            prompts.add(opening.messages[0].content)
            assert await host.step(read(opening.messages[0].content)) == Score(1.0, True)
            host.close()
        assert len(prompts) == 2
    finally:
        await pool.close()
