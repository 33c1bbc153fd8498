"""The gateway in a separate process, called by the client of the rollout workers."""

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from palimpsest.common.control.access import SERVICE_TOKEN as VARIABLE
from palimpsest.common.environments import lookup
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.port import SessionFailed
from palimpsest.common.sessions.wire import CreateSession, Status, Step
from tests.processes.waiting import LIMIT_S
from tests.unit.env_gateway.running import (
    ROOT,
    Launch,
    LosesAnswers,
    accepts,
    answering,
    launching,
    plugged_in,
    refusal,
    until,
)
from tools.backends.ports import free

pytestmark = pytest.mark.servers


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as launch:
        yield launch


@asynccontextmanager
async def client(url: str, *, timeout_s: float = LIMIT_S) -> AsyncIterator[SessionClient]:
    async with SessionClient(url, timeout_s=timeout_s, connections=200) as opened:
        yield opened


async def played(sessions: SessionClient, environment: str, seed: int, texts: list[str]) -> Step:
    """Last reply of a session with these model messages."""
    session = await sessions.create(
        CreateSession(environment=environment, seed=seed), idempotency_key=f"{environment}{seed}"
    )
    step = Step(step=-1, status=Status.RUNNING)
    for text in texts:
        step = await sessions.step(session.session_id, step.step + 1, text)
    return step


async def test_two_hundred_concurrent_sessions_run_to_their_end(launch: Launch) -> None:
    gateway = answering(launch)
    async with client(gateway.url) as sessions:
        ends = await asyncio.gather(*(played(sessions, "lookup", seed, lookup.solution(seed)) for seed in range(200)))
    assert [(end.status, end.reward, end.success) for end in ends] == [(Status.TERMINATED, 1.0, True)] * 200
    status = httpx.get(f"{gateway.url}/v1/status", timeout=LIMIT_S).json()
    assert (status["live_sessions"], status["sessions"]) == (0, {"terminated": 200})
    assert gateway.metric('palimpsest_gateway_steps_total{environment="lookup"}') == 400
    assert gateway.metric('palimpsest_gateway_reward_sum{environment="lookup"}') == 200


async def test_lost_answers_are_requested_again_and_every_step_is_applied_once(launch: Launch) -> None:
    gateway = answering(launch)
    proxy = LosesAnswers(gateway.port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    async with server, client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as sessions:
        texts = [render("lookup", {"key": key}) for key in lookup.KEYS[:5]]
        ends = await asyncio.gather(
            *(played(sessions, "lookup", seed, [*texts, *lookup.solution(seed)[1:]]) for seed in range(200))
        )
    # a step applied twice would reach the sixth message early and end the session without the answer
    assert all(end.status is Status.TERMINATED and end.step == 5 for end in ends)
    assert sum(end.reward or 0.0 for end in ends) == pytest.approx(
        sum(0.3 for seed in range(200) if "amber" in lookup.solution(seed)[0])
        + sum(0.7 for seed in range(200) if "ember" in lookup.solution(seed)[0])
    )
    assert min(proxy.lost.values()) > 30
    for request, lost in proxy.lost.items():
        assert gateway.metric(f'palimpsest_gateway_replays_total{{request="{request}"}}') == lost
    assert gateway.metric('palimpsest_gateway_steps_total{environment="lookup"}') == 1200
    assert gateway.metric('palimpsest_gateway_sessions_created_total{environment="lookup"}') == 200


async def test_a_step_whose_client_timed_out_is_applied_once_and_answered_later(launch: Launch, tmp_path: Path) -> None:
    gateway = answering(launch, plugged_in("Waits"))
    gate = tmp_path / "gate"
    async with client(gateway.url) as sessions:
        session = await sessions.create(CreateSession(environment="waits", seed=0), idempotency_key="k")
        body = {"step": 0, "action": {"type": "text", "text": str(gate)}}
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{gateway.url}/v1/sessions/{session.session_id}/step",
                    json=body,
                    timeout=httpx.Timeout(LIMIT_S, read=0.2),
                )
        gate.touch()
        end = await sessions.step(session.session_id, 0, str(gate))
    assert (end.status, end.reward) == (Status.TERMINATED, 0.75)
    assert gateway.metric('palimpsest_gateway_steps_total{environment="waits"}') == 1


async def test_failing_environments_end_as_errors_and_the_gateway_continues(launch: Launch) -> None:
    failing = {
        "Raises": "environment_raised",
        "Hangs": "environment_timeout",
        "HangsInC": "environment_timeout",
        "NotANumber": "environment_invalid",
        "TooMuch": "environment_invalid",
        "Exits": "environment_crashed",
        "Segfaults": "environment_crashed",
    }
    gateway = answering(launch, plugged_in(*failing), "--env_gateway.step_limit_s=10")
    async with client(gateway.url) as sessions:
        ends = await asyncio.gather(*(played(sessions, name.lower(), 0, ["go on"]) for name in failing))
        for end, (name, code) in zip(ends, failing.items(), strict=True):
            assert (end.status, end.reward, end.success) == (Status.ERROR, None, None)
            assert end.error is not None
            assert end.error.code == code
            sample = f'palimpsest_gateway_environment_failures_total{{code="{code}",environment="{name.lower()}"}}'
            assert gateway.metric(sample) == 1
        assert (await played(sessions, "lookup", 1, lookup.solution(1))).reward == 1.0
    (fork_server,) = psutil.Process(gateway.process.pid).children()
    assert psutil.wait_procs(fork_server.children(recursive=True), timeout=LIMIT_S)[1] == []


async def test_an_environment_that_fails_at_reset_is_tried_again_at_the_next_request(launch: Launch) -> None:
    gateway = answering(launch, plugged_in("RaisesAtReset"))
    async with client(gateway.url) as sessions:
        for _ in range(2):
            with pytest.raises(SessionFailed, match="LookupError: no such task") as failed:
                await played(sessions, "raisesatreset", 0, [])
            assert failed.value.code == "environment_raised"
    sample = 'palimpsest_gateway_environment_failures_total{code="environment_raised",environment="raisesatreset"}'
    assert gateway.metric(sample) == 2


async def test_sessions_beyond_max_processes_wait_and_are_then_refused(launch: Launch) -> None:
    gateway = answering(launch, plugged_in("Counts"), "--env_gateway.max_processes=2")
    async with client(gateway.url) as sessions:
        held = [
            await sessions.create(CreateSession(environment="counts", seed=seed), idempotency_key=f"{seed}")
            for seed in range(2)
        ]
        wanted = {"environment": "counts", "seed": 2}
        refused = httpx.post(f"{gateway.url}/v1/sessions", json=wanted, timeout=LIMIT_S)
        assert (refused.status_code, refused.json()["code"]) == (429, "capacity")
        waiting = asyncio.create_task(sessions.create(CreateSession(**wanted), idempotency_key="2"))
        await sessions.close(held[0].session_id)
        assert (await waiting).messages[0].content == "task 2"


async def test_generated_tasks_run_in_child_processes(launch: Launch) -> None:
    gateway = answering(launch, "--tasks.environments={ 'reasoning_gym.chain_sum' = 1.0 }")
    async with client(gateway.url) as sessions:
        wanted = CreateSession(environment="reasoning_gym.chain_sum", seed=3)
        session = await sessions.create(wanted, idempotency_key="k")
        (sum_asked,) = re.findall(r"problem: (.*) =", session.messages[0].content)
        reply = await sessions.step(session.session_id, 0, render("calculator", {"expression": sum_asked}))
        end = await sessions.step(session.session_id, 1, reply.messages[0].content)
    assert (end.reward, end.success) == (1.0, True)


async def test_requests_need_the_token_and_environments_do_not_see_it(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("right\n")
    gateway = answering(launch, plugged_in("Looks"), **{f"{VARIABLE}_FILE": str(tmp_path / "token")})
    for wrong in ("wrong", None):
        monkeypatch.setenv(VARIABLE, wrong) if wrong else monkeypatch.delenv(VARIABLE)
        async with client(gateway.url) as sessions:
            with pytest.raises(SessionFailed) as error:
                await played(sessions, "lookup", 0, [])
            assert error.value.code == "unauthorized"
    monkeypatch.setenv(VARIABLE, "right")
    async with client(gateway.url) as sessions:
        assert (await played(sessions, "lookup", 1, lookup.solution(1))).reward == 1.0
        seen = await played(sessions, "looks", 0, [""])
    assert seen.messages[0].content.startswith("[] True ")


async def test_an_environment_reads_no_secret_in_its_variables_nor_in_those_of_its_parents(launch: Launch) -> None:
    secrets = {
        VARIABLE: "s3cret-gateway", "AWS_SECRET_ACCESS_KEY": "s3cret-s3", "PALIMPSEST_KAFKA_PASSWORD": "s3cret-kafka",
        "OTHER_API_KEY": "s3cret-other",
    }  # fmt: skip
    given = {"TASK_DATA": "/data", "SHARED_TOKEN": "for-tools"}
    named = "--env_gateway.plugin_variables=['TASK_DATA', 'SHARED_TOKEN']"
    gateway = answering(launch, plugged_in("ReadsVariables"), named, **secrets, **given)
    headers = {"Authorization": f"Bearer {secrets[VARIABLE]}"}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=LIMIT_S, trust_env=False) as http:
        session = http.post("/v1/sessions", json={"environment": "readsvariables", "seed": 0}).json()["session_id"]
        action = {"type": "text", "text": str(gateway.process.pid)}
        step = http.post(f"/v1/sessions/{session}/step", json={"step": 0, "action": action}).json()
    seen = step["messages"][0]["content"].split("\n")
    assert not [entry for entry in seen if "s3cret" in entry]
    assert "AWS_SECRET_ACCESS_KEY=*********" in seen, "the gateway's own variables were read"
    assert {"TASK_DATA=/data", "SHARED_TOKEN=for-tools"} <= set(seen)


@pytest.mark.parametrize("end", ["close", "kill the gateway", "kill the fork server"])
async def test_a_process_that_left_its_session_ends_with_it(launch: Launch, end: str) -> None:
    gateway = answering(launch, plugged_in("StartsDaemon"))
    async with client(gateway.url) as sessions:
        session = await sessions.create(CreateSession(environment="startsdaemon", seed=0), idempotency_key="k")
        reply = await sessions.step(session.session_id, 0, "go on")
        daemon = psutil.Process(int(reply.messages[0].content))
        (fork_server,) = psutil.Process(gateway.process.pid).children()
        assert os.getsid(daemon.pid) not in {process.pid for process in (fork_server, *fork_server.children())}
        if end == "close":
            await sessions.close(session.session_id)
        else:
            (gateway.process if end == "kill the gateway" else fork_server).kill()
    assert psutil.wait_procs([daemon], timeout=LIMIT_S)[1] == []


def test_an_open_address_without_a_token_is_refused(launch: Launch) -> None:
    code, error = refusal(launch("--env_gateway.host=0.0.0.0", f"--env_gateway.port={free()}"))
    assert code == 2
    assert error.startswith("env_gateway.host: 0.0.0.0 can be reached from outside this machine")
    assert VARIABLE in error


def test_a_port_in_use_is_reported_with_its_key(launch: Launch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, error = refusal(launch(f"--env_gateway.port={port}"))
    assert code == 3
    assert f"port {port} on 127.0.0.1 is in use" in error
    assert "--env_gateway.port=PORT" in error


@pytest.mark.parametrize(
    ("flag", "start"),
    [
        (
            "--env_gateway.plugins={ mine = 'absent.module:Class' }",
            "env_gateway.plugins.mine: absent.module:Class cannot",
        ),
        (
            "--env_gateway.plugins={ mine = 'awkward:NoFinalize' }",
            "env_gateway.plugins.mine: awkward:NoFinalize cannot",
        ),
        ("--env_gateway.plugins={ hop = 'awkward:Counts' }", "env_gateway.plugins.hop: there is an environment"),
        ("--tasks.environments={ lokup = 1.0 }", "tasks.environments: the gateway has no environment 'lokup'; did you"),
    ],
)
def test_unusable_environments_are_refused_before_the_gateway_listens(launch: Launch, flag: str, start: str) -> None:
    process = launch(f"--env_gateway.port={free()}", flag)
    code, error = refusal(process)
    assert code == 2
    assert error.startswith(start)


async def test_sigterm_finishes_running_steps_and_leaves_no_process(launch: Launch, tmp_path: Path) -> None:
    gateway = answering(launch, plugged_in("Waits", "Counts"))
    gate = tmp_path / "gate"
    async with client(gateway.url) as sessions:
        busy = await sessions.create(CreateSession(environment="waits", seed=0), idempotency_key="busy")
        await sessions.create(CreateSession(environment="counts", seed=0), idempotency_key="idle")
        step = asyncio.create_task(sessions.step(busy.session_id, 0, str(gate)))
        descendants = gateway.descendants()
        assert len(descendants) == 3
        await until((tmp_path / "gate.entered").exists)
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: not accepts(gateway.port))
        gate.touch()
        assert (await step).reward == 0.75
    assert await asyncio.to_thread(gateway.process.wait, LIMIT_S) == 130
    assert psutil.wait_procs(descendants, timeout=LIMIT_S)[1] == []


async def test_a_killed_gateway_leaves_no_process_even_if_environments_hang(launch: Launch, tmp_path: Path) -> None:
    gateway = answering(launch, plugged_in("Counts", "Hangs", "HangsInC", "StartsOthers"))
    async with client(gateway.url) as sessions:
        await played(sessions, "counts", 0, [])
        await played(sessions, "startsothers", 0, ["go on"])
        names = ("hangs", "hangsinc")
        hanging = [asyncio.create_task(played(sessions, name, 0, [str(tmp_path / name)])) for name in names]
        await until(lambda: all((tmp_path / f"{name}.entered").exists() for name in names))
        descendants = gateway.descendants()
        assert len(descendants) == 6
        gateway.process.kill()
        gateway.process.wait()
        for task in hanging:
            task.cancel()
    assert psutil.wait_procs(descendants, timeout=LIMIT_S)[1] == []


async def test_a_gateway_killed_while_it_loads_a_module_leaves_no_process(launch: Launch, tmp_path: Path) -> None:
    process = launch(f"--env_gateway.port={free()}", "--env_gateway.plugins={ mine = 'never_loads:Class' }")
    await until((tmp_path / "never_loads.entered").exists)
    (fork_server,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert psutil.wait_procs([fork_server], timeout=LIMIT_S)[1] == []


async def test_the_example_environment_of_the_documentation_works(launch: Launch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "gateway.md").read_text()
    (source,) = re.findall(r"```python\n(\"\"\"guess.py: .*?)```", page, re.DOTALL)
    (table,) = re.findall(r"```toml\n\[env_gateway\]\nplugins = (.*?)\n```", page, re.DOTALL)
    (tmp_path / "guess.py").write_text(source)
    gateway = answering(launch, f"--env_gateway.plugins={table}")
    described = httpx.get(f"{gateway.url}/v1/envs/guess", timeout=LIMIT_S).json()
    assert described["description"] == "Find a number by asking whether it is higher or lower."
    async with client(gateway.url) as sessions:
        session = await sessions.create(CreateSession(environment="guess", seed=5), idempotency_key="k")
        reply = await sessions.step(session.session_id, 0, render("ask", {"n": "ten"}))
        assert reply.messages[0].content == "n is a whole number"
        low, high, number = 1, 100, 1
        while (hint := reply.messages[0].content) != "right":
            middle = (low + high) // 2
            reply = await sessions.step(session.session_id, number, render("ask", {"n": middle}))
            number, hint = number + 1, reply.messages[0].content
            low, high = (middle + 1 if hint == "higher" else low), (middle - 1 if hint == "lower" else high)
        end = await sessions.step(session.session_id, number, str(middle))
    assert (end.status, end.reward, end.success) == (Status.TERMINATED, 1.0, True)
