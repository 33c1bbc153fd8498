"""Hostile environments: their session fails or is refused the means, and the sessions beside it continue."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.environments.port import EnvironmentFailed, Reply, Score, Turn
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway import child_limits as the_limits
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.confinement import USERS, Available, ChildLimits, available
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec
from tests.processes.user_range import own_users
from tests.processes.waiting import LIMIT_S, until

pytestmark = pytest.mark.servers
FOLDER = Path(__file__).parent / "plugins"
USER = own_users()
HERE = available(USER)
LIMITS = ChildLimits(
    memory_mib=2048, processes=20 if HERE.processes else None, files=64, file_mib=8, user=USER, isolate=HERE.network
)


MANY = 10**6
HANGS_S = 2.0
"""Limit of a call that never returns."""


async def attacks(limits: ChildLimits | None, texts: dict[str, str], *, network: bool = False) -> dict[str, str]:
    """Let each of these environments take a step, all at once, beside a quiet session that ends with its score.

    Returns name -> answer, or the code of the failure.
    """
    pool = Pool(limit=len(texts) + 1, wait_s=0.2, call_limit_s=LIMIT_S, modules=("hostile",), limits=limits)

    async def attack(name: str, text: str) -> str:
        host = await InChild.open(pool, EnvironmentSpec(path=f"hostile:{name}", network=network))
        try:
            await host.reset(0)
            if name == "Hangs":
                host._call_limit_s = HANGS_S
            reply = await host.step(Turn(text))
        except EnvironmentFailed as failed:
            return failed.code
        finally:
            host.close()
        assert isinstance(reply, Reply)
        return reply.messages[0].content

    try:
        quiet = await InChild.open(pool, EnvironmentSpec(path="hostile:Quiet"))
        await quiet.reset(0)
        answers = await asyncio.gather(*(attack(name, text) for name, text in texts.items()))
        assert isinstance(await quiet.step(Turn("")), Reply)
        assert await quiet.finalize() == Score(0.25, False)
        quiet.close()
    finally:
        await pool.close()
    return dict(zip(texts, answers, strict=True))


@pytest.fixture
def target() -> Iterator[tuple[int, Path]]:
    """A port that answers, and the name of a file in a folder to which every user may write."""
    with socket.create_server(("127.0.0.1", 0)) as server, TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield server.getsockname()[1], Path(folder) / "filled"


async def test_hostile_environments_meet_their_limits_and_leave_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, target: tuple[int, Path], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    port, file = target
    texts = {"TakesMemory": "", "OpensFiles": "", "FillsTheDisk": str(file), "Hangs": "", "Floods": "", "Lies": ""}
    texts["ReadsItsScore"] = ""
    expected = {
        "ReadsItsScore": "1000",
        "TakesMemory": "environment_raised",
        "FillsTheDisk": f"{8 * 2**20} File too large",
        "Hangs": "environment_timeout",
        "Floods": "environment_invalid",
        "Lies": "environment_invalid",
    }
    if HERE.processes:
        texts["ForkBomb"] = ""
    if HERE.network:
        texts["Connects"], expected["Connects"] = str(port), "Connection refused"
    if USER is not None:
        texts |= {"KillsTheGateway": str(os.getpid()), "WritesItsReward": str(tmp_path / "reward.json")}
        expected |= {
            "KillsTheGateway": "Operation not permitted, Operation not permitted",
            "WritesItsReward": "Permission denied",
        }
    answers = await attacks(LIMITS, texts)
    number, _, why = answers.pop("OpensFiles").partition(" ")
    assert (int(number) < LIMITS.files, why) == (True, "Too many open files")
    assert int(answers.pop("ForkBomb", "0")) < (LIMITS.processes or MANY)
    assert answers == expected
    if USER is not None:
        until(lambda: not processes_of(USER))


def processes_of(user: int) -> list[int]:
    """Ids of the processes whose user is one of those that sessions get from this one on."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if user <= process.uids().real < user + USERS:
                found.append(process.pid)
    return found


@pytest.mark.parametrize("limits", [None, LIMITS], ids=["no limits", "permitted"])
async def test_an_environment_that_may_use_the_network_has_it(
    monkeypatch: pytest.MonkeyPatch, target: tuple[int, Path], limits: ChildLimits | None
) -> None:
    """So the test above notices if the limits are switched off."""
    monkeypatch.syspath_prepend(str(FOLDER))
    own = Path("/proc/self/oom_score_adj").read_text().strip()
    expected = {"ReadsItsScore": "1000" if limits else own}
    assert await attacks(limits, {"ReadsItsScore": ""}, network=True) == expected
    assert await attacks(limits, {"Connects": str(target[0])}, network=True) == {"Connects": "connected"}


def test_a_configuration_that_demands_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_limits, "available", lambda user: Available(False, False, "no namespace can be made"))
    limits, problem = the_limits.child_limits(EnvGatewayConfig())
    assert (limits.isolate, limits.processes, problem) == (False, None, "no namespace can be made")
    with pytest.raises(UserError, match=r'isolation is "required", but no namespace can be made'):
        the_limits.child_limits(EnvGatewayConfig(isolation="required"))
