"""Programs of a model: what they attack stays whole, and the sessions beside them continue."""

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.environments.port import EnvironmentFailed, Reply, Score, Turn
from palimpsest.common.environments.sandbox.command import Tools
from palimpsest.common.environments.sandbox.program import OFF, SandboxOff, run_program
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.code_tools import code_tools
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.confinement import ChildLimits, available
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec
from tests.processes.user_range import own_users
from tests.processes.waiting import LIMIT_S, until
from tests.unit.env_gateway.running import answering, launching, refusal
from tests.unit.env_gateway.test_confinement import processes_of
from tools.backends import downloads

pytestmark = pytest.mark.servers
FOLDER = Path(__file__).parent / "plugins"
USER = own_users()
LIMITS = ChildLimits(
    memory_mib=4096, processes=100, files=64, file_mib=1024, user=USER, isolate=available(USER).network
)
LOOK = """
import os
def text(path):
    try: return open(path, "rb").read(10**6)
    except OSError: return b""
paths = ["FILE", "/proc/PARENT/environ", "/proc/self/environ"]
found = [path for path in paths if b"secret-of-" in text(path)]
print("sees", len(found), "secret-of-" in str(os.environ), os.path.exists("/proc/PARENT"))
try:
    open("FILE", "w").write("mine")
    print("wrote")
except OSError as error: print(error.strerror)
"""
PROGRAMS = {
    "fork bomb": """
import os, time
made = 0
while True:
    try:
        if os.fork() == 0: time.sleep(3600)
    except BlockingIOError: break
    made += 1
print("made", made < 32)
""",
    "50 MB": "print('x' * 50_000_000)",
    "network": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "signals": "import os; os.kill(PARENT, 9)",
    "memory": "bytearray(2 * 2**30)",
    "folder": "open('file', 'wb').write(bytes(100 * 2**20))",
    "root": "open('/file', 'w')",
    "namespaces": "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))",
    "daemon": "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(3600)",
    "descriptors": """
import os
def is_open(number):
    try: return bool(os.fstat(number))
    except OSError: return False
print([number for number in range(64) if is_open(number)])
""",
    "packages": "import pydantic",
    "look": LOOK,
}


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    """bubblewrap and a Python that the users of the sessions may read."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bwrap = Path(shutil.copy(downloads.bubblewrap(), folder))
        bwrap.chmod(0o755)
        yield Tools(bwrap=str(bwrap), python="/usr/bin/python3" if USER is not None else sys.executable)


async def run_all(tools: Tools | None, programs: dict[str, tuple[str, str]]) -> dict[str, tuple[str, Score | None]]:
    """Let a session of each environment run its program, all at once, beside a quiet session that ends with its score.

    programs: name -> environment and program. Returns name -> answer and score, or the failure and None.
    """
    pool = Pool(
        limit=len(programs) + 1,
        wait_s=0.2,
        call_limit_s=LIMIT_S,
        modules=("hostile",),
        limits=LIMITS,
        code_tools=tools,
    )

    async def run(environment: str, program: str) -> tuple[str, Score | None]:
        host = await InChild.open(pool, EnvironmentSpec(path=f"hostile:{environment}"))
        try:
            await host.reset(0)
            reply = await host.step(Turn(program))
            assert isinstance(reply, Reply)
            return reply.messages[0].content, await host.finalize()
        except EnvironmentFailed as failed:
            return f"{failed.code}: {failed}", None
        finally:
            host.close()

    try:
        quiet = await InChild.open(pool, EnvironmentSpec(path="hostile:Quiet"))
        await quiet.reset(0)
        answers = await asyncio.gather(*(run(*program) for program in programs.values()))
        assert isinstance(await quiet.step(Turn("")), Reply)
        assert await quiet.finalize() == Score(0.25, False)
        quiet.close()
    finally:
        await pool.close()
    return dict(zip(programs, answers, strict=True))


async def test_hostile_programs_get_a_result_and_change_neither_the_reward_nor_other_sessions(
    monkeypatch: pytest.MonkeyPatch, tools: Tools
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    programs = {name: ("RunsPrograms", text.replace("PORT", "9")) for name, text in PROGRAMS.items()}
    programs["loop"] = ("RunsProgramsBriefly", "while True: pass")
    programs["large"] = ("RunsLargePrograms", "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20)")
    answers = await run_all(tools, programs)
    rewards = {name: score and score.reward for name, (_, score) in answers.items()}
    assert rewards == dict.fromkeys(answers, 1.0), "each reward is that of its environment"
    texts = {name: text for name, (text, _) in answers.items()}
    assert all(text.endswith(" 0 left") for text in texts.values()), texts
    assert texts.pop("fork bomb") == "0 made True  0 left"
    assert texts.pop("large") == f"0 {LIMITS.memory_mib}  0 left", "at most the limit of the session"
    assert texts.pop("loop") == "None   0 left"
    assert texts.pop("daemon") == "0   0 left"
    assert texts.pop("descriptors") == "0 [0, 1, 2]  0 left"
    assert texts.pop("namespaces") == "0 -1  0 left"
    assert texts.pop("look") == "0 sees 0 False False No such file or directory  0 left"
    assert texts.pop("50 MB").startswith(f"0 {'x' * 1000} [truncated: the first 1000 of 50000001 bytes]")
    reasons = {
        "network": "Connection refused", "signals": "ProcessLookupError", "memory": "MemoryError",
        "folder": "No space left on device", "root": "Read-only file system", "packages": "ModuleNotFoundError",
    }  # fmt: skip
    assert reasons.keys() == texts.keys()
    assert not {name: text for name, text in texts.items() if not text.startswith("1 ") or reasons[name] not in text}
    if USER is not None:
        until(lambda: not processes_of(USER))


async def test_without_a_sandbox_the_same_program_changes_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above notices if the sandbox is switched off."""
    monkeypatch.syspath_prepend(str(FOLDER))
    ((text, score),) = (await run_all(None, {"look": ("RunsProgramsUnconfined", LOOK)})).values()
    assert text.startswith("0 sees 2 True True wrote"), text
    assert score == Score(0.0, False)


async def test_a_sandbox_that_fails_gives_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    broken = Tools(bwrap="/bin/false", python="/usr/bin/python3")
    answers = await run_all(broken, {"fails": ("RunsPrograms", ""), "off": ("RunsPrograms", "")})
    assert [score for _, score in answers.values()] == [None, None]
    assert all("environment_raised: SandboxFailed: bubblewrap could not run" in text for text, _ in answers.values())


async def test_without_permission_such_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SandboxOff, match=r'env_gateway\.code_tools is "off"'):
        run_program("print(1)")
    pool = Pool(limit=1, wait_s=1.0, call_limit_s=60.0)
    try:
        assert pool.describe(EnvironmentSpec(path="hostile:RunsPrograms")).problem == OFF
        assert pool.describe(EnvironmentSpec(path="hostile:Quiet")).problem == ""
    finally:
        await pool.close()


def test_a_gateway_offers_the_tool_with_the_key_alone(tmp_path: Path, tools: Tools) -> None:
    plugin = '--env_gateway.plugins={ product = "programs:Product" }'
    keys = ["--env_gateway.code_tools=bubblewrap", f"--env_gateway.code_python={tools.python}"]
    if USER is not None:
        keys.append(f"--env_gateway.child_user={USER + 500}")
    call = render("python", {"code": "print(6 * 7)"})
    with launching(tmp_path) as launch:
        code, message = refusal(launch("--env_gateway.port=1", plugin))
        assert (code, f"programs:Product cannot be used: {OFF}" in message) == (2, True)
        gateway = answering(launch, plugin, *keys, PATH=f"{Path(tools.bwrap).parent}:{os.environ['PATH']}")
        with httpx.Client(base_url=gateway.url, timeout=LIMIT_S) as client:
            begun = client.post("/v1/sessions", json={"environment": "product", "seed": 0}).json()
            session, texts = f"/v1/sessions/{begun['session_id']}", (call, "42")
            first, last = (
                client.post(f"{session}/step", json={"step": n, "action": {"type": "text", "text": text}}).json()
                for n, text in enumerate(texts)
            )
    assert first["messages"] == [{"role": "tool", "content": "exit status 0\n[stdout]\n42"}]
    assert (last["status"], last["reward"]) == ("terminated", 1.0)


def test_what_is_missing_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch, tools: Tools) -> None:
    on = EnvGatewayConfig(code_tools="bubblewrap", code_python=tools.python)
    assert code_tools(EnvGatewayConfig(), LIMITS) is None
    with pytest.raises(UserError, match=r'code_python: env_gateway.code_tools is "off"'):
        code_tools(EnvGatewayConfig(code_python="/usr/bin/python3"), LIMITS)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no program bwrap is on the PATH: install bubblewrap"):
        code_tools(on, LIMITS)
    monkeypatch.setenv("PATH", str(Path(tools.bwrap).parent))
    with pytest.raises(UserError, match=r"processes cannot be limited here.*Set env_gateway.child_user"):
        code_tools(on, LIMITS.model_copy(update={"processes": None}))
    assert code_tools(on, LIMITS) == tools


@pytest.mark.parametrize("python", ["/nowhere", "/nowhere/bin/python", "no-python", "/"])
def test_a_python_that_does_not_exist_is_named(python: str) -> None:
    with pytest.raises(UserError, match=r"env_gateway\.code_python is '\S+', which is not a program"):
        code_tools(EnvGatewayConfig(code_tools="bubblewrap", code_python=python), None)
